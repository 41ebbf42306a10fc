// One step of decoding on the CPU. A task is a head of a prompt (or a run of its visible keys, where heads are few) for
// a group of its samples: it scores the text keys for all samples of the group together and the image keys of each,
// takes one softmax over both, and sums the values likewise. No result depends on the number of threads.
#include "attention/decode.h"

#include <cstdlib>

#include "common/integer.h"
#include "common/parallel.h"
#include "common/row_products.h"
#include "common/vector_math.h"

namespace dalle::DALLE_ISA_NAMESPACE {
namespace {

constexpr int64_t WIDTH = Vector::width;
constexpr int64_t GROUP = 32;          // samples of a task at most: so few that their scores fit the L2 cache
constexpr int64_t KEY_BLOCK = 64;      // values summed at a time: a block of them fits the L1 cache
constexpr int64_t TASKS_WANTED = 8;    // not the number of threads: the order of a sum must not depend on it
constexpr int64_t SEGMENT_KEYS = 128;  // at least, to be worth a task

int64_t round_up(int64_t count) { return rounded_up(count, WIDTH); }

// Some keys (or values) of a head, as rows of head_dim elements.
template <class T>
struct Rows {
  const T* data;
  int64_t head_dim;
  const int32_t* slots;  // which rows, or nullptr: the first ones
  int64_t count;

  const T* row(int64_t i) const { return data + (slots == nullptr ? i : slots[i]) * head_dim; }
};

template <class T>
void copy_token(const TokenHeads& from, int64_t row, int64_t head, int64_t count, T* to) {
  const T* start = static_cast<const T*>(from.data) + row * from.row_stride + head * from.head_stride;
  for (int64_t d = 0; d < count; ++d) to[d] = start[d * from.element_stride];
}

// scores[r * score_stride + i] = query r . key i.
template <int ROWS, class T>
void score(const float* queries, int64_t query_stride, const Rows<T>& keys, float* scores, int64_t score_stride) {
  constexpr int COLUMNS = tile_columns(ROWS);
  for (int64_t first = 0; first < keys.count; first += COLUMNS) {
    const T* w[COLUMNS];
    for (int c = 0; c < COLUMNS; ++c) w[c] = keys.row(smaller(first + c, keys.count - 1));
    float products[ROWS * COLUMNS];
    row_products<ROWS>(queries, query_stride, w, keys.head_dim, COLUMNS * keys.head_dim, products);
    const int64_t columns = smaller(COLUMNS, keys.count - first);
    for (int r = 0; r < ROWS; ++r) {
      for (int64_t c = 0; c < columns; ++c) scores[r * score_stride + first + c] = products[r * COLUMNS + c];
    }
  }
}

template <class T>
void score_all(int64_t rows, const float* queries, int64_t query_stride, const Rows<T>& keys, float* scores,
               int64_t score_stride) {
  for (int64_t tiles = (rows + TILE_MOST_ROWS - 1) / TILE_MOST_ROWS, tile = 0; tile < tiles; ++tile) {
    const int64_t first = tile * rows / tiles;
    const float* q = queries + first * query_stride;
    float* s = scores + first * score_stride;
    switch ((tile + 1) * rows / tiles - first) {
      case 1: score<1>(q, query_stride, keys, s, score_stride); break;
      case 2: score<2>(q, query_stride, keys, s, score_stride); break;
      case 3: score<3>(q, query_stride, keys, s, score_stride); break;
      default: score<4>(q, query_stride, keys, s, score_stride);
    }
  }
}

// e^(factor * (score - the largest)) over `count` scores, in place, with zeros up to round_up(count).
void exponentials(float* scores, int64_t count, float factor, float* largest, float* sum) {
  const int64_t end = round_up(count);
  for (int64_t i = count; i < end; ++i) scores[i] = -__builtin_inff();
  Vector maxima = load(scores);
  for (int64_t i = WIDTH; i < end; i += WIDTH) maxima = maximum(load(scores + i), maxima);
  *largest = largest_lane(maxima);
  const Vector shift = broadcast(*largest);
  Vector sums = broadcast(0.0f);
  for (int64_t i = 0; i < end; i += WIDTH) {
    const Vector p = exponential((load(scores + i) - shift) * broadcast(factor));
    store(scores + i, p);
    sums = sums + p;
  }
  *sum = sum_of_lanes(sums);
}

// out[r * out_stride + d] += sum over i in [begin, end) of weights[r * weight_stride + i] * value i, for `rows` <=
// ROWS. WHOLE: head_dim is a multiple of the vector's width.
template <int ROWS, bool WHOLE, class T>
void add_values(int64_t rows, const float* weights, int64_t weight_stride, const Rows<T>& values, int64_t begin,
                int64_t end, float* out, int64_t out_stride) {
  constexpr int VECTORS = ROWS == 1 ? (WIDTH == 16 ? 4 : 8) : 2;
  const int64_t last = round_up(values.head_dim) - WIDTH;
  for (int64_t d = 0; d < values.head_dim; d += VECTORS * WIDTH) {
    int64_t at[VECTORS];  // a vector or a row beyond the end takes the place of the last, and is not stored
    for (int v = 0; v < VECTORS; ++v) at[v] = smaller(d + v * WIDTH, last);
    Vector sums[ROWS * VECTORS];
#pragma GCC unroll 8
    for (int j = 0; j < ROWS * VECTORS; ++j) sums[j] = broadcast(0.0f);
    for (int64_t i = begin; i < end; ++i) {
      const T* row = values.row(i);
      Vector value[VECTORS];
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) {
        value[v] = WHOLE ? load(row + at[v]) : load_first(row + at[v], values.head_dim - at[v]);
      }
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        const Vector weight = broadcast(weights[smaller(r, rows - 1) * weight_stride + i]);
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) sums[r * VECTORS + v] = multiply_add(weight, value[v], sums[r * VECTORS + v]);
      }
    }
    for (int r = 0; r < rows; ++r) {
      for (int v = 0; v < VECTORS && d + v * WIDTH < values.head_dim; ++v) {
        float* sum = out + r * out_stride + at[v];
        store(sum, load(sum) + sums[r * VECTORS + v]);
      }
    }
  }
}

template <class T>
void add_all_values(int64_t rows, const float* weights, int64_t weight_stride, const Rows<T>& values, float* out,
                    int64_t out_stride) {
  const bool whole = values.head_dim % WIDTH == 0;
  for (int64_t begin = 0; begin < values.count; begin += KEY_BLOCK) {
    const int64_t end = smaller(begin + KEY_BLOCK, values.count);
    for (int64_t r = 0; r < rows; r += TILE_MOST_ROWS) {
      const int64_t tile = smaller(TILE_MOST_ROWS, rows - r);
      const auto add = tile == 1 ? whole ? add_values<1, true, T> : add_values<1, false, T>
                       : whole   ? add_values<TILE_MOST_ROWS, true, T>
                                 : add_values<TILE_MOST_ROWS, false, T>;
      add(tile, weights + r * weight_stride, weight_stride, values, begin, end, out + r * out_stride, out_stride);
    }
  }
}

// How a step is cut into tasks, and what each needs of memory.
struct Tasks {
  const DecodeAttention& p;
  int64_t keys, groups, segments, width;

  explicit Tasks(const DecodeAttention& p_)
      : p(p_),
        keys(p.text_keys + p.image_keys),
        groups((p.samples + GROUP - 1) / GROUP),
        width(round_up(p.head_dim)) {
    const int64_t heads = p.prompts * p.heads * groups;
    segments = larger(1, smaller((TASKS_WANTED + heads - 1) / heads, keys / SEGMENT_KEYS));
  }
  int64_t count() const { return p.prompts * p.heads * groups * segments; }
  int64_t first_sample(int64_t group) const { return group * p.samples / groups; }
  int64_t first_key(int64_t segment) const { return segment * keys / segments; }
  int64_t most_samples() const { return (p.samples + groups - 1) / groups; }
  int64_t score_stride() const { return round_up((keys + segments - 1) / segments); }
  int64_t scratch_floats() const { return most_samples() * (2 * width + score_stride()); }
  int64_t part_floats() const { return width + WIDTH; }  // a row's sum of values; then its largest score and its sum
};

// How scale enters: its sign with the queries, its magnitude with the scores (a zero scale zeroes the queries instead).
struct Scale {
  float sign, magnitude;
  explicit Scale(float scale)
      : sign(scale > 0 ? 1.0f : scale < 0 ? -1.0f : 0.0f), magnitude(scale == 0 ? 1.0f : scale < 0 ? -scale : scale) {}
};

template <class T>
void write_row(const float* from, float factor, int64_t count, T* to) {
  for (int64_t d = 0; d < count; d += WIDTH) {
    store_first(to + d, count - d, load(from + d) * broadcast(factor));
  }
}

template <class T>
struct Step {
  const DecodeAttention& p;
  const Tasks tasks;
  const Scale scale;
  float* parts;  // part_floats() for each row, head and segment, where there is more than one

  T* text(int64_t which, int64_t prompt_head) const {
    const int64_t head = which * p.prompts * p.heads + prompt_head;
    return static_cast<T*>(p.text) + head * p.text_capacity * p.head_dim;
  }
  T* image(int64_t which, int64_t prompt_head, int64_t sample) const {
    const int64_t head = (which * p.prompts * p.heads + prompt_head) * p.samples + sample;
    return static_cast<T*>(p.image) + head * p.image_capacity * p.head_dim;
  }
  T* out(int64_t prompt_head, int64_t sample) const {
    const int64_t row = prompt_head / p.heads * p.samples + sample;
    return static_cast<T*>(p.out) + (row * p.heads + prompt_head % p.heads) * p.head_dim;
  }
  float* part(int64_t prompt_head, int64_t sample, int64_t segment) const {
    return parts + ((prompt_head * p.samples + sample) * tasks.segments + segment) * tasks.part_floats();
  }

  void write_new_key(int64_t prompt_head, int64_t first, int64_t last) const {
    for (int64_t sample = first; sample < last; ++sample) {
      const int64_t row = prompt_head / p.heads * p.samples + sample, i = p.new_key - p.text_keys;
      for (int64_t which = 0; which < 2; ++which) {
        const int64_t slot = i < 0 || p.image_slots == nullptr ? i : p.image_slots[i];
        T* to = i < 0 ? text(which, prompt_head) + p.new_key * p.head_dim
                      : image(which, prompt_head, sample) + slot * p.head_dim;
        copy_token(which == 0 ? p.k_new : p.v_new, row, prompt_head % p.heads, p.head_dim, to);
      }
    }
  }

  void run(int64_t task, float* scratch) const {
    const int64_t segment = task % tasks.segments, group = task / tasks.segments % tasks.groups;
    const int64_t prompt_head = task / tasks.segments / tasks.groups;
    const int64_t first = tasks.first_sample(group), samples = tasks.first_sample(group + 1) - first;
    const int64_t begin = tasks.first_key(segment), end = tasks.first_key(segment + 1);
    if (begin <= p.new_key && p.new_key < end) write_new_key(prompt_head, first, first + samples);

    const int64_t width = tasks.width, stride = tasks.score_stride();
    float *queries = scratch, *sums = queries + samples * width, *scores = sums + samples * width;
    for (int64_t r = 0; r < samples; ++r) {
      const TokenHeads& q = p.q;
      const int64_t row = prompt_head / p.heads * p.samples + first + r;
      const T* from = static_cast<const T*>(q.data) + row * q.row_stride + prompt_head % p.heads * q.head_stride;
      for (int64_t d = 0; d < p.head_dim; ++d) {
        queries[r * width + d] = to_float(from[d * q.element_stride]) * scale.sign;
      }
      for (int64_t d = 0; d < width; ++d) sums[r * width + d] = 0.0f;
    }

    const int64_t text_begin = smaller(begin, p.text_keys), text_keys = smaller(end, p.text_keys) - text_begin;
    const int64_t image_begin = larger(begin - p.text_keys, 0), image_keys = end - begin - text_keys;
    const auto text_rows = [&](int64_t which) {
      return Rows<T>{text(which, prompt_head) + text_begin * p.head_dim, p.head_dim, nullptr, text_keys};
    };
    const auto image_rows = [&](int64_t which, int64_t r) {
      const bool listed = p.image_slots != nullptr;
      const T* data = image(which, prompt_head, first + r) + (listed ? 0 : image_begin) * p.head_dim;
      return Rows<T>{data, p.head_dim, listed ? p.image_slots + image_begin : nullptr, image_keys};
    };
    score_all(samples, queries, width, text_rows(0), scores, stride);
    float largest[GROUP], total[GROUP];
    for (int64_t r = 0; r < samples; ++r) {
      float* row = scores + r * stride;
      score<1>(queries + r * width, width, image_rows(0, r), row + text_keys, stride);
      exponentials(row, end - begin, scale.magnitude, &largest[r], &total[r]);
    }
    add_all_values(samples, scores, stride, text_rows(1), sums, width);
    for (int64_t r = 0; r < samples; ++r) {
      float* sum = sums + r * width;
      add_all_values(1, scores + r * stride + text_keys, stride, image_rows(1, r), sum, width);
      if (tasks.segments == 1) {
        write_row(sum, 1.0f / total[r], p.head_dim, out(prompt_head, first + r));
      } else {
        float* to = part(prompt_head, first + r, segment);
        memcpy(to, sum, width * sizeof(float));
        to[width] = largest[r];
        to[width + 1] = total[r];
      }
    }
  }

  // The segments of a row and head as one softmax, in order.
  void join(int64_t prompt_head, int64_t sample) const {
    const int64_t width = tasks.width;
    float* sum = part(prompt_head, sample, 0);
    float largest = sum[width];
    for (int64_t s = 1; s < tasks.segments; ++s) {
      const float other = part(prompt_head, sample, s)[width];
      largest = other > largest ? other : largest;
    }
    float total = 0.0f;
    for (int64_t s = 0; s < tasks.segments; ++s) {
      const float* from = part(prompt_head, sample, s);
      const Vector factor = exponential(broadcast((from[width] - largest) * scale.magnitude));
      float weights[WIDTH];
      store(weights, factor);
      total += weights[0] * from[width + 1];
      for (int64_t d = 0; d < width; d += WIDTH) {
        store(sum + d, multiply_add(factor, load(from + d), s == 0 ? broadcast(0.0f) : load(sum + d)));
      }
    }
    write_row(sum, 1.0f / total, p.head_dim, out(prompt_head, sample));
  }
};

template <class T>
const char* decode(const DecodeAttention& p) {
  const Tasks tasks(p);
  const int64_t scratch_floats = round_up(tasks.scratch_floats());
  const int64_t rows = p.prompts * p.heads * p.samples;
  const int64_t parts_floats = tasks.segments > 1 ? rows * tasks.segments * tasks.part_floats() : 0;
  float* scratch = static_cast<float*>(malloc((p.threads * scratch_floats + parts_floats) * sizeof(float)));
  if (scratch == nullptr) return "not enough memory for the scores of a step";
  const Step<T> step{p, tasks, Scale(p.scale), scratch + p.threads * scratch_floats};
  parallel_items(tasks.count(), p.threads,
                 [&](int64_t task, int thread) { step.run(task, scratch + thread * scratch_floats); });
  if (tasks.segments > 1) {
    for (int64_t row = 0; row < rows; ++row) step.join(row / p.samples, row % p.samples);
  }
  free(scratch);
  return nullptr;
}

}  // namespace

const char* decode_attention(const DecodeAttention& p) {
  switch (p.dtype) {
    case Dtype::float32: return decode<float>(p);
    case Dtype::float16: return decode<Half>(p);
    case Dtype::bfloat16: return decode<BFloat16>(p);
    default: return "expected float32, float16 or bfloat16";
  }
}

}  // namespace dalle::DALLE_ISA_NAMESPACE
