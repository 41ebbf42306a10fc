// Sparse attention on the CPU. Where there are heads enough, each thread takes one after the other; else the threads
// pack the keys of a few heads together, and then share out their tiles. No result depends on the number of threads.
#include "attention/attention.h"

#include "attention/pairs.h"
#include "attention/tile.h"
#include "common/parallel.h"
#include "common/scratch.h"

namespace dalle::DALLE_ISA_NAMESPACE {
namespace {

constexpr const char* OUT_OF_MEMORY = "not enough memory for the scratch space";

class Pieces {
 public:
  explicit Pieces(float* next) : next_(next) {}
  template <class Element = float>
  Element* take(int64_t floats) {
    float* piece = next_;
    next_ += (floats + 15) / 16 * 16;
    return reinterpret_cast<Element*>(piece);
  }

 private:
  float* next_;
};

class BorrowedPlan {
 public:
  BorrowedPlan(const Pattern& pattern, int key_step)
      : plan_(borrow_plan(pattern, {PANEL, MOST_ROWS, TILE_PANELS, key_step})) {}
  ~BorrowedPlan() { return_plan(plan_); }
  BorrowedPlan(const BorrowedPlan&) = delete;
  BorrowedPlan& operator=(const BorrowedPlan&) = delete;
  const Plan& operator*() const { return *plan_; }

 private:
  const Plan* plan_;
};

// How scale enters: its sign with the queries, its magnitude with the scores (a zero scale zeroes the queries instead).
// `exponent` is |scale| * log2(e), or as small as leaves room for differences of scores below -127 / exponent.
struct Scale {
  float sign, magnitude, exponent;
  explicit Scale(float scale)
      : sign(scale > 0 ? 1.0f : scale < 0 ? -1.0f : 0.0f),
        magnitude(scale < 0 ? -scale : scale),
        exponent(scale == 0           ? 1.0f
                 : magnitude < 1e-36f ? 1e-36f
                                      : static_cast<float>(magnitude * 1.4426950408889634)) {}
};

// What all tasks of a call share. Sizes are in elements of 4 bytes, whatever they hold.
template <class T, class Element_>
struct Context {
  using Element = Element_;
  static constexpr int64_t PER = NUMBERS_IN<Element>;

  const Plan& plan;
  Columns columns;
  Scale scale;
  int64_t step_blocks;  // of the sum over head_dim
  Chunk over_head_dim[256 / PANEL];

  Context(const Plan& plan_, int64_t head_dim, float scale_) : plan(plan_), columns(head_dim), scale(scale_) {
    const int64_t steps = (head_dim + PER - 1) / PER;
    step_blocks = (steps + PANEL - 1) / PANEL;
    for (int64_t block = 0; block < step_blocks; ++block) {
      const int64_t left = steps - block * PANEL;
      over_head_dim[block] = {block * plan.keys * PANEL, block * PANEL * PANEL, left < PANEL ? left : PANEL};
    }
  }
  Product<Element> over_columns(const Element* rows) const {
    return {rows, nullptr, over_head_dim, step_blocks, PARTIAL_SCORE};
  }

  // With pairs, less than this is filled.
  int64_t key_floats() const { return plan.keys * columns.width; }
  int64_t panel_floats() const { return PANEL * columns.width; }
  int64_t tile_floats() const { return TILE_PANELS * panel_floats(); }
  int64_t score_floats() const { return static_cast<int64_t>(TILE_PANELS) * plan.most_keys * PANEL; }
  int64_t chunk_floats() const { return TILE_GROUPS * (plan.most_spans + 1) * sizeof(Chunk) / sizeof(float); }
};

template <class T>
Matrix<T> head_of(const Heads& tensor, int64_t heads, int64_t head) {
  return {static_cast<T*>(tensor.data) + head / heads * tensor.batch_stride + head % heads * tensor.head_stride,
          tensor.token_stride};
}

// A head's keys and values as blocked rows: elements along each row for the scores, and across rows for sums over keys;
// of floats these are the same.
template <class T, class Element>
struct PackedHead {
  Element *keys, *values;

  PackedHead(float* start, const Context<T, Element>& c)
      : keys(reinterpret_cast<Element*>(start)), values(reinterpret_cast<Element*>(start + c.key_floats())) {}
  static int64_t floats(const Context<T, Element>& c) { return 2 * c.key_floats(); }

  static constexpr int64_t PIECE = 64;  // rows that one task packs where several share a head
  static int64_t pieces(const Context<T, Element>& c) { return (c.plan.keys + PIECE - 1) / PIECE; }

  void pack(const Matrix<const T>& k, const Matrix<const T>& v, const Context<T, Element>& c, int64_t first,
            int64_t count) const {
    constexpr int64_t PER = NUMBERS_IN<Element>;
    const int64_t left = c.plan.keys - first, rows = count < left ? count : left;
    const int32_t* tokens = c.plan.key_token + first;
    pack_along_rows(k, tokens, rows, 1.0f, c.columns, keys + first * PANEL, c.plan.keys);
    pack_across_rows(v, tokens, rows, 1.0f, c.columns, values + first / PER * PANEL, c.plan.keys / PER);
  }
};

// A tile's rows, and the same transposed: [panel][head_dim][PANEL].
template <class T, class Element>
void pack_tile(const Matrix<const T>& from, const View& view, float factor, const Context<T, Element>& c,
               Element* rows, Element* transposed) {
  for (int64_t g = 0; g < view.tile.panels; ++g) {
    const int64_t start = g * c.panel_floats();
    pack_along_rows(from, view.tokens(g), PANEL, factor, c.columns, rows + start, PANEL);
    transpose_panel(rows + start, c.step_blocks, transposed + start);
  }
}

template <class T, class Element>
void fetch_tile(const Matrix<const T>& from, const View& view, const Context<T, Element>& c) {
  for (int64_t i = 0; i < view.tile.panels * PANEL; ++i) fetch_row(from, view.tokens(0)[i], c.columns.head_dim);
}

// ---- Forward

template <class T>
using ForwardContext = Context<T, typename PackedAs<T>::Element>;
template <class T>
using ForwardHead = PackedHead<T, typename PackedAs<T>::Element>;

template <class T>
struct ForwardScratch {
  typename PackedAs<T>::Element *rows, *queries;
  float *out, *scores;
  Chunk* chunks;
  int64_t floats;

  ForwardScratch(float* start, const ForwardContext<T>& c) {
    Pieces pieces(start);
    rows = pieces.take<typename PackedAs<T>::Element>(c.tile_floats());
    queries = pieces.take<typename PackedAs<T>::Element>(c.tile_floats());
    out = pieces.take(c.tile_floats());
    scores = pieces.take(c.score_floats());
    chunks = pieces.take<Chunk>(c.chunk_floats());
    floats = pieces.take(0) - start;
  }
};

template <class T>
void forward_tile(const SparseAttention& p, const ForwardContext<T>& c, int64_t head, int32_t t,
                  const ForwardHead<T>& packed, const ForwardScratch<T>& scratch) {
  using Element = typename PackedAs<T>::Element;
  const auto q = head_of<const T>(p.q, p.heads, head);
  const auto out = head_of<T>(p.out, p.heads, head);
  float* lse = p.lse == nullptr ? nullptr : p.lse + head * p.pattern.seq;
  const View view{c.plan, c.plan.tile[t]};
  pack_tile(q, view, c.scale.sign, c, scratch.rows, scratch.queries);
  if (t + 1 < c.plan.tiles) fetch_tile(q, View{c.plan, c.plan.tile[t + 1]}, c);
  products(view, c.over_columns(packed.keys), scratch.queries, c.panel_floats(), scratch.scores);
  float maxima[TILE_PANELS][PANEL], sums[TILE_PANELS][PANEL];
  for (int64_t g = 0; g < view.tile.panels; ++g) {
    softmax(view, g, c.scale.exponent, scratch.scores + g * view.stride(), maxima[g], sums[g]);
    join_keys(reinterpret_cast<Element*>(scratch.scores + g * view.stride()), view.keys(g) * PANEL);
  }
  const Element* probabilities = reinterpret_cast<const Element*>(scratch.scores);
  weighted_sum(view, c.columns, probabilities, packed.values, scratch.chunks, scratch.out);
  for (int64_t g = 0; g < view.tile.panels; ++g) {
    const int32_t* tokens = view.tokens(g);
    for (int64_t j = 0; j < view.panel(g).queries; ++j) {
      if (lse != nullptr) lse[tokens[j]] = maxima[g][j] * c.scale.magnitude + __builtin_logf(sums[g][j]);
      sums[g][j] = 1.0f / sums[g][j];
    }
    const float* rows = scratch.out + g * c.panel_floats();
    unpack_rows(rows, PANEL, tokens, view.panel(g).queries, 1.0f, sums[g], c.columns, out);
  }
}

// Heads of which each thread takes one at a time, from its keys to its last tile; with fewer, threads share heads.
constexpr int64_t HEADS_A_THREAD = 4;

template <class T>
const char* forward(const SparseAttention& p) {
  const BorrowedPlan borrowed(p.pattern, ForwardContext<T>::PER);
  const ForwardContext<T> c(*borrowed, p.head_dim, p.scale);
  const int64_t heads = p.batch * p.heads;
  const int64_t packed_floats = ForwardHead<T>::floats(c);
  const int64_t own_floats = ForwardScratch<T>(nullptr, c).floats;
  const int64_t floats = p.threads * (packed_floats + own_floats);
  if (p.workspace != nullptr) return *p.workspace = floats * sizeof(float), nullptr;
  const Scratch scratch(1, floats);
  if (scratch.failed()) return OUT_OF_MEMORY;
  const auto packed = [&](int64_t i) { return ForwardHead<T>(scratch.of(0) + i * packed_floats, c); };
  const auto own = [&](int i) {
    return ForwardScratch<T>(scratch.of(0) + p.threads * packed_floats + i * own_floats, c);
  };
  const auto pack = [&](int64_t head, int64_t i, int64_t first, int64_t count) {
    packed(i).pack(head_of<const T>(p.k, p.heads, head), head_of<const T>(p.v, p.heads, head), c, first, count);
  };
  if (heads >= HEADS_A_THREAD * p.threads) {
    parallel_items(heads, p.threads, [&](int64_t head, int thread) {
      pack(head, thread, 0, c.plan.keys);
      for (int32_t t = 0; t < c.plan.tiles; ++t) forward_tile<T>(p, c, head, t, packed(thread), own(thread));
    });
    return nullptr;
  }
  for (int64_t first = 0; first < heads; first += p.threads) {
    const int64_t group = heads - first < p.threads ? heads - first : p.threads, pieces = ForwardHead<T>::pieces(c);
    parallel_items(group * pieces, p.threads, [&](int64_t item, int) {
      pack(first + item / pieces, item / pieces, item % pieces * ForwardHead<T>::PIECE, ForwardHead<T>::PIECE);
    });
    parallel_items(group * c.plan.tiles, p.threads, [&](int64_t item, int thread) {
      const int64_t i = item / c.plan.tiles;
      forward_tile<T>(p, c, first + i, item % c.plan.tiles, packed(i), own(thread));
    });
  }
  return nullptr;
}

// ---- Backward: p = probabilities, dp = grad_out . v, ds = p (dp - p . dp), and then
//      dq = scale ds k,  dk = scale ds^T q,  dv = p^T grad_out.

// In float32, bfloat16 as well: with probabilities and score gradients rounded to bfloat16, gradients broke the error
// rule.
template <class T>
using BackwardContext = Context<T, float>;
template <class T>
using BackwardHead = PackedHead<T, float>;

template <class T>
struct BackwardScratch {
  float *query_rows, *queries, *grad_rows, *grads, *dq, *scores, *grad_scores;
  Chunk* chunks;
  int64_t floats;

  BackwardScratch(float* start, const BackwardContext<T>& c) {
    Pieces pieces(start);
    query_rows = pieces.take(c.tile_floats());
    queries = pieces.take(c.tile_floats());
    grad_rows = pieces.take(c.tile_floats());
    grads = pieces.take(c.tile_floats());
    dq = pieces.take(c.tile_floats());
    scores = pieces.take(c.score_floats());
    grad_scores = pieces.take(c.score_floats());
    chunks = pieces.take<Chunk>(c.chunk_floats());
    floats = pieces.take(0) - start;
  }
};

// Gradients of a head's keys and values as blocked rows, summed over the tiles of one segment of a head.
struct KeySums {
  float *dk, *dv;

  static constexpr int64_t BLOCKS = 2;  // the blocks of dv follow those of dk
  template <class Any>
  KeySums(float* start, const Any& c) : dk(start), dv(start + c.key_floats()) {}
  template <class Any>
  static int64_t floats(const Any& c) {
    return BLOCKS * c.key_floats();
  }
};

// The keys that a run of tiles sees lie in two ranges, of the text and of the image.
struct KeyRanges {
  int64_t first[2], end[2];

  KeyRanges(const Plan& plan, int32_t first_tile, int32_t end_tile)
      : first{0, plan.keys}, end{plan.first_image_key, plan.first_image_key} {
    for (int32_t t = first_tile; t < end_tile; ++t) {
      const Tile& tile = plan.tile[t];
      if (tile.first_image_key == tile.end_image_key) continue;
      first[1] = tile.first_image_key < first[1] ? tile.first_image_key : first[1];
      end[1] = tile.end_image_key > end[1] ? tile.end_image_key : end[1];
    }
  }
};

// From a panel's unnormalized probabilities p and dp = grad_out . v (in ds): normalizes p, and sets ds. `sums` are the
// queries' sums of p. The shift, p . dp, equals grad_out . out, but taken here it is free of the rounding of a 16-bit
// out.
DALLE_NOINLINE void score_gradients(const View& view, int64_t g, const float* sums, float* p, float* ds) {
  constexpr int64_t PART = 32;
  float inverses[PANEL];  // 0 in lanes without a query
  for (int64_t j = 0; j < PANEL; ++j) inverses[j] = j < view.panel(g).queries ? 1.0f / sums[j] : 0.0f;
  const int64_t end = view.keys(g) * PANEL;
  for (int v = 0; v < view.vectors(g); ++v) {
    const int64_t lane = v * Vector::width;
    const Vector inverse = load(inverses + lane);
    Vector shift = broadcast(0.0f);
    for (int64_t i = lane; i < end;) {
      const int64_t stop = i + PART * PANEL < end ? i + PART * PANEL : end;
      Vector part = broadcast(0.0f);
      for (; i < stop; i += PANEL) part = multiply_add(load(p + i), load(ds + i), part);
      shift = shift + part;
    }
    shift = shift * inverse;
    for (int64_t i = lane; i < end; i += PANEL) {
      const Vector probability = load(p + i) * inverse;
      store(p + i, probability);
      store(ds + i, probability * (load(ds + i) - shift));
    }
  }
}

template <class T>
void backward_tile(const SparseAttentionBackward& p, const BackwardContext<T>& c, int64_t head, int32_t t,
                   const BackwardHead<T>& packed, const BackwardScratch<T>& scratch, const KeySums& sums) {
  const auto q = head_of<const T>(p.q, p.heads, head), grad_out = head_of<const T>(p.grad_out, p.heads, head);
  const auto dq = head_of<T>(p.dq, p.heads, head);
  const View view{c.plan, c.plan.tile[t]};
  pack_tile(q, view, c.scale.sign, c, scratch.query_rows, scratch.queries);
  pack_tile(grad_out, view, 1.0f, c, scratch.grad_rows, scratch.grads);
  if (t + 1 < c.plan.tiles) {
    fetch_tile(q, View{c.plan, c.plan.tile[t + 1]}, c);
    fetch_tile(grad_out, View{c.plan, c.plan.tile[t + 1]}, c);
  }
  products(view, c.over_columns(packed.keys), scratch.queries, c.panel_floats(), scratch.scores);
  products(view, c.over_columns(packed.values), scratch.grads, c.panel_floats(), scratch.grad_scores);
  for (int64_t g = 0; g < view.tile.panels; ++g) {
    float maxima[PANEL], row_sums[PANEL], *scores = scratch.scores + g * view.stride();
    softmax(view, g, c.scale.exponent, scores, maxima, row_sums);
    score_gradients(view, g, row_sums, scores, scratch.grad_scores + g * view.stride());
  }
  const float *probabilities = scratch.scores, *ds = scratch.grad_scores;
  scatter_sum(view, c.columns, probabilities, static_cast<const float*>(scratch.grad_rows), sums.dv);
  scatter_sum(view, c.columns, ds, static_cast<const float*>(scratch.query_rows), sums.dk);
  weighted_sum(view, c.columns, ds, static_cast<const float*>(packed.keys), scratch.chunks, scratch.dq);
  for (int64_t g = 0; g < view.tile.panels; ++g) {
    const float* rows = scratch.dq + g * c.panel_floats();
    unpack_rows(rows, PANEL, view.tokens(g), view.panel(g).queries, p.scale, nullptr, c.columns, dq);
  }
}

template <class T>
void backward_tiles(const SparseAttentionBackward& p, const BackwardContext<T>& c, int64_t head, int32_t first,
                    int32_t end, bool all_keys, const BackwardHead<T>& packed, const BackwardScratch<T>& scratch,
                    const KeySums& sums) {
  KeyRanges ranges(c.plan, first, end);
  if (all_keys) ranges.first[1] = ranges.end[0], ranges.end[1] = c.plan.keys;
  for (int64_t block = 0; block < KeySums::BLOCKS * c.columns.blocks; ++block) {
    for (int part = 0; part < 2; ++part) {
      const int64_t rows = ranges.end[part] - ranges.first[part];
      float* const from = sums.dk + (block * c.plan.keys + ranges.first[part]) * PANEL;
      if (rows > 0) memset(from, 0, rows * PANEL * sizeof(float));
    }
  }
  for (int32_t t = first; t < end; ++t) backward_tile<T>(p, c, head, t, packed, scratch, sums);
}

template <class T>
void write_key_sums(const SparseAttentionBackward& p, const BackwardContext<T>& c, int64_t head, const KeySums& sums,
                    int64_t first, int64_t end) {
  const auto dk = head_of<T>(p.dk, p.heads, head), dv = head_of<T>(p.dv, p.heads, head);
  const int32_t* tokens = c.plan.key_token + first;
  const int64_t start = first * PANEL, rows = c.plan.keys;
  // The sign of scale came with the queries.
  unpack_rows(sums.dk + start, rows, tokens, end - first, c.scale.magnitude, nullptr, c.columns, dk);
  unpack_rows(sums.dv + start, rows, tokens, end - first, 1.0f, nullptr, c.columns, dv);
}

// Adds what the later segments of a head have summed for the keys [first, end), in their order, to the first one's
// sums.
template <class T>
void add_segments(const BackwardContext<T>& c, float* sums, int32_t segments, int64_t first, int64_t end) {
  for (int32_t s = 1; s < segments; ++s) {
    const float* addend = sums + s * KeySums::floats(c);
    const KeyRanges ranges(c.plan, c.plan.cut(s, segments), c.plan.cut(s + 1, segments));
    for (int part = 0; part < 2; ++part) {
      const int64_t from = first > ranges.first[part] ? first : ranges.first[part];
      const int64_t to = end < ranges.end[part] ? end : ranges.end[part];
      for (int64_t block = 0; block < KeySums::BLOCKS * c.columns.blocks; ++block) {
        const int64_t offset = block * c.plan.keys;
        for (int64_t i = (offset + from) * PANEL; i < (offset + to) * PANEL; i += Vector::width) {
          store(sums + i, load(sums + i) + load(addend + i));
        }
      }
    }
  }
}

// Heads below which the tiles of one are cut into segments. Not the number of threads: the sums over segments must not
// depend on it.
constexpr int64_t ENOUGH_HEADS = 8;

template <class T>
const char* backward(const SparseAttentionBackward& p) {
  const BorrowedPlan borrowed(p.pattern, BackwardContext<T>::PER);
  const BackwardContext<T> c(*borrowed, p.head_dim, p.scale);
  const int64_t heads = p.batch * p.heads, wanted = (ENOUGH_HEADS + heads - 1) / heads;
  const int32_t segments = wanted < c.plan.tiles ? wanted : c.plan.tiles;
  const int64_t packed_count = segments > 1 ? heads : p.threads;
  const int64_t sums_count = segments > 1 ? heads * segments : p.threads;
  const int64_t packed_floats = BackwardHead<T>::floats(c);
  const int64_t own_floats = BackwardScratch<T>(nullptr, c).floats;
  const int64_t sums_floats = KeySums::floats(c);
  const int64_t floats = packed_count * packed_floats + p.threads * own_floats;
  if (p.workspace != nullptr) return *p.workspace = (floats + sums_count * sums_floats) * sizeof(float), nullptr;
  const Scratch scratch(1, floats), sums(1, sums_count * sums_floats);
  if (scratch.failed() || sums.failed()) return OUT_OF_MEMORY;
  const auto packed = [&](int64_t i) { return BackwardHead<T>(scratch.of(0) + i * packed_floats, c); };
  const auto own = [&](int i) {
    return BackwardScratch<T>(scratch.of(0) + packed_count * packed_floats + i * own_floats, c);
  };
  const auto sums_of = [&](int64_t i) { return KeySums(sums.of(0) + i * sums_floats, c); };
  const auto pack = [&](int64_t head, int64_t i, int64_t first, int64_t count) {
    packed(i).pack(head_of<const T>(p.k, p.heads, head), head_of<const T>(p.v, p.heads, head), c, first, count);
  };
  if (segments == 1) {
    parallel_items(heads, p.threads, [&](int64_t head, int thread) {
      pack(head, thread, 0, c.plan.keys);
      backward_tiles<T>(p, c, head, 0, c.plan.tiles, true, packed(thread), own(thread), sums_of(thread));
      write_key_sums<T>(p, c, head, sums_of(thread), 0, c.plan.keys);
    });
    return nullptr;
  }
  const int64_t pieces = BackwardHead<T>::pieces(c);
  parallel_items(heads * pieces, p.threads, [&](int64_t item, int) {
    pack(item / pieces, item / pieces, item % pieces * BackwardHead<T>::PIECE, BackwardHead<T>::PIECE);
  });
  parallel_items(heads * segments, p.threads, [&](int64_t item, int thread) {
    const int64_t head = item / segments;
    const int32_t segment = item % segments;
    backward_tiles<T>(p, c, head, c.plan.cut(segment, segments), c.plan.cut(segment + 1, segments), segment == 0,
                      packed(head), own(thread), sums_of(item));
  });
  parallel_items(heads * pieces, p.threads, [&](int64_t item, int) {
    const int64_t head = item / pieces, first = item % pieces * BackwardHead<T>::PIECE;
    const int64_t end = first + BackwardHead<T>::PIECE < c.plan.keys ? first + BackwardHead<T>::PIECE : c.plan.keys;
    const KeySums total = sums_of(head * segments);
    add_segments(c, total.dk, segments, first, end);
    write_key_sums<T>(p, c, head, total, first, end);
  });
  return nullptr;
}

}  // namespace

const char* sparse_attention(const SparseAttention& p) {
  if (p.workspace != nullptr) *p.workspace = 0;
  if (p.batch * p.heads * p.pattern.seq == 0) return nullptr;
  switch (p.dtype) {
    case Dtype::float32: return forward<float>(p);
    case Dtype::float16: return forward<Half>(p);
    case Dtype::bfloat16: return forward<BFloat16>(p);
    default: return "expected float32, float16 or bfloat16";
  }
}

const char* sparse_attention_backward(const SparseAttentionBackward& p) {
  if (p.workspace != nullptr) *p.workspace = 0;
  if (p.batch * p.heads * p.pattern.seq == 0) return nullptr;
  switch (p.dtype) {
    case Dtype::float32: return backward<float>(p);
    case Dtype::float16: return backward<Half>(p);
    case Dtype::bfloat16: return backward<BFloat16>(p);
    default: return "expected float32, float16 or bfloat16";
  }
}

}  // namespace dalle::DALLE_ISA_NAMESPACE
