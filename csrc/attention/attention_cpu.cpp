// Sparse attention on the CPU. A task is a head of a sample (or a run of its tiles, where heads are few): it packs the
// head's keys and values once as float32, then takes tile after tile. No result depends on the number of threads.
#include "attention/attention.h"

#include <cstdlib>

#include "attention/tile.h"
#include "common/parallel.h"

namespace dalle::DALLE_ISA_NAMESPACE {
namespace {

constexpr const char* OUT_OF_MEMORY = "not enough memory for the scratch space of a head";

// Scratch space: one allocation, handed out in pieces aligned to a cache line.
class Scratch {
 public:
  explicit Scratch(int64_t floats) : data_(static_cast<float*>(aligned_alloc(64, round_up(floats) * sizeof(float)))) {}
  ~Scratch() { free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  static int64_t round_up(int64_t floats) { return (floats + 15) / 16 * 16; }
  float* data() const { return data_; }

 private:
  float* data_;
};

class Pieces {
 public:
  explicit Pieces(float* next) : next_(next) {}
  float* take(int64_t floats) {
    float* piece = next_;
    next_ += Scratch::round_up(floats);
    return piece;
  }

 private:
  float* next_;
};

class OwnedPlan {
 public:
  OwnedPlan(const Pattern& pattern) : plan_(new_plan(pattern, PANEL, TILE_ROWS)) {}
  ~OwnedPlan() { delete_plan(plan_); }
  OwnedPlan(const OwnedPlan&) = delete;
  OwnedPlan& operator=(const OwnedPlan&) = delete;
  const Plan& operator*() const { return *plan_; }

 private:
  const Plan* plan_;
};

// How scale enters: its sign with the queries, its magnitude with the scores (a zero scale zeroes the queries instead).
struct Scale {
  float sign, magnitude;
  double exponent;
  explicit Scale(float scale)
      : sign(scale > 0 ? 1.0f : scale < 0 ? -1.0f : 0.0f),
        magnitude(scale < 0 ? -scale : scale),
        exponent(scale == 0 ? 1.0 : magnitude * 1.4426950408889634) {}
};

// The tasks of a call: `segments` runs of tiles for each of the heads of all samples.
struct Tasks {
  int64_t heads, segments;

  // Enough for a balanced load; a function of the shape alone wherever the order of a sum depends on it.
  Tasks(int64_t heads_, int64_t wanted, const Plan& plan) : heads(heads_), segments((wanted + heads_ - 1) / heads_) {
    if (segments > plan.tiles) segments = plan.tiles;
  }
  int64_t count() const { return heads * segments; }
};

template <class T>
struct Matrix {
  T* data;
  int64_t stride;
};

template <class T>
Matrix<T> head_of(const Heads& tensor, int64_t heads, int64_t head) {
  return {static_cast<T*>(tensor.data) + head / heads * tensor.batch_stride + head % heads * tensor.head_stride,
          tensor.token_stride};
}

int64_t tile_floats(const Dimensions& dims) { return TILE_ROWS * dims.width; }
int64_t score_floats(const Plan& plan) { return static_cast<int64_t>(plan.most_slots) * TILE_ROWS * PANEL; }

// ---- Forward

struct ForwardScratch {
  float *keys, *values, *queries, *out, *scores, *rows;

  ForwardScratch(float* start, const Dimensions& dims, const Plan& plan) {
    Pieces pieces(start);
    keys = pieces.take(dims.keys * dims.width);
    values = pieces.take(dims.keys * dims.width);
    queries = pieces.take(tile_floats(dims));
    out = pieces.take(tile_floats(dims));
    scores = pieces.take(score_floats(plan));
    rows = pieces.take(PANEL * dims.width);
    floats = pieces.take(0) - start;
  }
  int64_t floats;
};

template <class T>
void forward_task(const SparseAttention& p, const Plan& plan, const Dimensions& dims, const Tasks& tasks, int64_t task,
                  const ForwardScratch& scratch) {
  const int64_t head = task / tasks.segments, segment = task % tasks.segments;
  const auto q = head_of<const T>(p.q, p.heads, head), k = head_of<const T>(p.k, p.heads, head);
  const auto v = head_of<const T>(p.v, p.heads, head);
  const auto out = head_of<T>(p.out, p.heads, head);
  float* lse = p.lse + head * p.pattern.seq;
  const Scale scale(p.scale);

  pack_panels(k.data, k.stride, plan, dims, scratch.rows, scratch.keys);
  pack_rows(v.data, v.stride, plan.key_token, dims.keys, 1.0f, dims, scratch.values, dims.keys);
  const int32_t last = plan.cut(segment + 1, tasks.segments);
  for (int32_t t = plan.cut(segment, tasks.segments); t < last; ++t) {
    const Tile& tile = plan.tile[t];
    const int32_t* tokens = plan.query_token + tile.first_row;
    const TileScores tile_scores{plan, dims, tile};
    float maxima[TILE_ROWS], sums[TILE_ROWS];
    pack_rows(q.data, q.stride, tokens, tile.rows, scale.sign, dims, scratch.queries, TILE_ROWS);
    if (t + 1 < plan.tiles) fetch_rows(q.data, q.stride, tokens + tile.rows, plan.tile[t + 1].rows, dims);
    tile_scores.probabilities(scratch.queries, scratch.keys, scale.exponent, scratch.scores, maxima, sums);
    tile_scores.weighted_sum(scratch.scores, scratch.values, scratch.out);
    for (int32_t r = 0; r < tile.rows; ++r) {
      lse[tokens[r]] = maxima[r] * scale.magnitude + __builtin_logf(sums[r]);
      sums[r] = 1.0f / sums[r];
    }
    unpack_rows(scratch.out, TILE_ROWS, tokens, tile.rows, 1.0f, sums, dims, out.data, out.stride);
  }
}

template <class T>
const char* forward(const SparseAttention& p) {
  const OwnedPlan owned(p.pattern);
  const Plan& plan = *owned;
  const Dimensions dims(p.head_dim, plan);
  const Tasks tasks(p.batch * p.heads, 4 * p.threads, plan);
  const int64_t floats = ForwardScratch(nullptr, dims, plan).floats;
  const Scratch scratch(p.threads * floats);
  if (scratch.data() == nullptr) return OUT_OF_MEMORY;
  parallel_items(tasks.count(), p.threads, [&](int64_t task, int thread) {
    forward_task<T>(p, plan, dims, tasks, task, ForwardScratch(scratch.data() + thread * floats, dims, plan));
  });
  return nullptr;
}

// ---- Backward: p = probabilities, dp = grad_out . v, ds = p (dp - p . dp), and then
//      dq = scale ds k,  dk = scale ds^T q,  dv = p^T grad_out.

struct BackwardScratch {
  float *keys, *key_rows, *values, *queries, *grad_out, *dq, *scores, *grad_scores, *rows;
  int64_t floats;

  BackwardScratch(float* start, const Dimensions& dims, const Plan& plan) {
    Pieces pieces(start);
    keys = pieces.take(dims.keys * dims.width);
    key_rows = pieces.take(dims.keys * dims.width);
    values = pieces.take(dims.keys * dims.width);
    queries = pieces.take(tile_floats(dims));
    grad_out = pieces.take(tile_floats(dims));
    dq = pieces.take(tile_floats(dims));
    scores = pieces.take(score_floats(plan));
    grad_scores = pieces.take(score_floats(plan));
    rows = pieces.take(PANEL * dims.width);
    floats = pieces.take(0) - start;
  }
};

// Gradients of a head's keys and values as blocked rows, summed over the tiles of one task.
struct KeySums {
  float *dk, *dv;

  KeySums(float* start, const Dimensions& dims) : dk(start), dv(start + dims.keys * dims.width) {}
  static int64_t floats(const Dimensions& dims) { return 2 * dims.keys * dims.width; }
};

// From unnormalized probabilities p: normalizes them, and sets ds from dp = grad_out . v. `sums` are the rows' sums of
// p. The shift, p . dp, equals grad_out . out, but taken here it is free of the rounding of a 16-bit out.
DALLE_NOINLINE void score_gradients(const TileScores& tile_scores, const float* grad_out, const float* values,
                                    const float* sums, float* p, float* ds) {
  const Tile& tile = tile_scores.tile;
  Vector shift[TILE_ROWS], inverse[TILE_ROWS];
  for (int64_t r = 0; r < tile.rows; ++r) shift[r] = broadcast(0.0f);
  for (int64_t slot = 0; slot < tile.slots; ++slot) {
    const int64_t start = slot * TILE_ROWS * PANEL;
    tile_scores.slot_product(slot, grad_out, values, ds + start);
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t i = start + r * PANEL, j = i + Vector::width;
      shift[r] = multiply_add(load(p + i), load(ds + i), multiply_add(load(p + j), load(ds + j), shift[r]));
    }
  }
  for (int64_t r = 0; r < tile.rows; ++r) {
    inverse[r] = broadcast(1.0f / sums[r]);
    shift[r] = broadcast(sum_of_lanes(shift[r]) * (1.0f / sums[r]));
  }
  for (int64_t slot = 0; slot < tile.slots; ++slot) {
    for (int64_t r = 0; r < tile.rows; ++r) {
      for (int64_t w = 0; w < PANEL; w += Vector::width) {
        const int64_t i = (slot * TILE_ROWS + r) * PANEL + w;
        const Vector probability = load(p + i) * inverse[r];
        store(p + i, probability);
        store(ds + i, probability * (load(ds + i) - shift[r]));
      }
    }
  }
}

template <class T>
void backward_task(const SparseAttentionBackward& p, const Plan& plan, const Dimensions& dims, const Tasks& tasks,
                   int64_t task, const BackwardScratch& scratch, const KeySums& sums) {
  const int64_t head = task / tasks.segments, segment = task % tasks.segments;
  const auto q = head_of<const T>(p.q, p.heads, head), k = head_of<const T>(p.k, p.heads, head);
  const auto v = head_of<const T>(p.v, p.heads, head);
  const auto grad_out = head_of<const T>(p.grad_out, p.heads, head);
  const auto dq = head_of<T>(p.dq, p.heads, head);
  const Scale scale(p.scale);

  pack_panels(k.data, k.stride, plan, dims, scratch.rows, scratch.keys);
  pack_panels(v.data, v.stride, plan, dims, scratch.rows, scratch.values);
  pack_rows(k.data, k.stride, plan.key_token, dims.keys, 1.0f, dims, scratch.key_rows, dims.keys);
  memset(sums.dk, 0, KeySums::floats(dims) * sizeof(float));
  const int32_t last = plan.cut(segment + 1, tasks.segments);
  for (int32_t t = plan.cut(segment, tasks.segments); t < last; ++t) {
    const Tile& tile = plan.tile[t];
    const int32_t* tokens = plan.query_token + tile.first_row;
    const TileScores tile_scores{plan, dims, tile};
    float maxima[TILE_ROWS], row_sums[TILE_ROWS];
    pack_rows(q.data, q.stride, tokens, tile.rows, scale.sign, dims, scratch.queries, TILE_ROWS);
    pack_rows(grad_out.data, grad_out.stride, tokens, tile.rows, 1.0f, dims, scratch.grad_out, TILE_ROWS);
    if (t + 1 < plan.tiles) {
      fetch_rows(q.data, q.stride, tokens + tile.rows, plan.tile[t + 1].rows, dims);
      fetch_rows(grad_out.data, grad_out.stride, tokens + tile.rows, plan.tile[t + 1].rows, dims);
    }
    tile_scores.probabilities(scratch.queries, scratch.keys, scale.exponent, scratch.scores, maxima, row_sums);
    score_gradients(tile_scores, scratch.grad_out, scratch.values, row_sums, scratch.scores, scratch.grad_scores);
    tile_scores.scatter_sum(scratch.scores, scratch.grad_out, sums.dv);
    tile_scores.scatter_sum(scratch.grad_scores, scratch.queries, sums.dk);
    tile_scores.weighted_sum(scratch.grad_scores, scratch.key_rows, scratch.dq);
    unpack_rows(scratch.dq, TILE_ROWS, tokens, tile.rows, p.scale, nullptr, dims, dq.data, dq.stride);
  }
}

template <class T>
void write_key_sums(const SparseAttentionBackward& p, const Plan& plan, const Dimensions& dims, int64_t head,
                    const KeySums& sums) {
  const auto dk = head_of<T>(p.dk, p.heads, head), dv = head_of<T>(p.dv, p.heads, head);
  const float scale = Scale(p.scale).magnitude;  // its sign came with the queries
  unpack_rows(sums.dk, dims.keys, plan.key_token, dims.keys, scale, nullptr, dims, dk.data, dk.stride);
  unpack_rows(sums.dv, dims.keys, plan.key_token, dims.keys, 1.0f, nullptr, dims, dv.data, dv.stride);
}

template <class T>
const char* backward(const SparseAttentionBackward& p) {
  const OwnedPlan owned(p.pattern);
  const Plan& plan = *owned;
  const Dimensions dims(p.head_dim, plan);
  constexpr int64_t TASKS_WANTED = 8;  // not the number of threads: the sums over segments must not depend on it
  const Tasks tasks(p.batch * p.heads, TASKS_WANTED, plan);
  const bool split = tasks.segments > 1;
  const int64_t floats = BackwardScratch(nullptr, dims, plan).floats, sums_floats = KeySums::floats(dims);
  const Scratch scratch(p.threads * floats), sums(sums_floats * (split ? tasks.count() : p.threads));
  if (scratch.data() == nullptr || sums.data() == nullptr) return OUT_OF_MEMORY;
  const auto sums_of = [&](int64_t index) { return KeySums(sums.data() + index * sums_floats, dims); };
  parallel_items(tasks.count(), p.threads, [&](int64_t task, int thread) {
    const KeySums own = sums_of(split ? task : thread);
    backward_task<T>(p, plan, dims, tasks, task, BackwardScratch(scratch.data() + thread * floats, dims, plan), own);
    if (!split) write_key_sums<T>(p, plan, dims, task, own);
  });
  if (!split) return nullptr;
  parallel_items(tasks.heads, p.threads, [&](int64_t head, int) {
    const KeySums total = sums_of(head * tasks.segments);
    for (int64_t segment = 1; segment < tasks.segments; ++segment) {
      const float* part = sums_of(head * tasks.segments + segment).dk;
      for (int64_t i = 0; i < sums_floats; ++i) total.dk[i] += part[i];
    }
    write_key_sums<T>(p, plan, dims, head, total);
  });
  return nullptr;
}

}  // namespace

const char* sparse_attention(const SparseAttention& p) {
  if (p.batch * p.heads * p.pattern.seq == 0) return nullptr;
  switch (p.dtype) {
    case Dtype::float32: return forward<float>(p);
    case Dtype::float16: return forward<Half>(p);
    case Dtype::bfloat16: return forward<BFloat16>(p);
    default: return "expected float32, float16 or bfloat16";
  }
}

const char* sparse_attention_backward(const SparseAttentionBackward& p) {
  if (p.batch * p.heads * p.pattern.seq == 0) return nullptr;
  switch (p.dtype) {
    case Dtype::float32: return backward<float>(p);
    case Dtype::float16: return backward<Half>(p);
    case Dtype::bfloat16: return backward<BFloat16>(p);
    default: return "expected float32, float16 or bfloat16";
  }
}

}  // namespace dalle::DALLE_ISA_NAMESPACE
