#include "cross_entropy/cross_entropy.h"

#include "common/parallel.h"
#include "common/vector_math.h"

namespace dalle::DALLE_ISA_NAMESPACE {
namespace {

constexpr float NOT_A_NUMBER = __builtin_nanf("");
constexpr int64_t GRAIN = 32768;  // elements that a thread is worth waking for

// One chunk: its logits in segments of classes, and for each row a maximum and sums.
class Chunk {
 public:
  explicit Chunk(const CrossEntropyChunk& p)
      : p_(p),
        segments_((p.classes + CROSS_ENTROPY_SEGMENT - 1) / CROSS_ENTROPY_SEGMENT),
        largest_(p.workspace),
        chosen_(largest_ + p.rows),
        kept_(chosen_ + p.rows),
        partial_(kept_ + p.rows) {}

  void run() const {
    for_each_segment([this](int64_t segment) { find_maxima(segment); });
    choose_targets();
    if (p_.row_scale != nullptr) {
      for_each_segment([this](int64_t segment) { exponentials<true>(segment); });
    } else {
      for_each_segment([this](int64_t segment) { exponentials<false>(segment); });
    }
    finish_rows();
    if (p_.row_scale != nullptr && p_.bias_sums != nullptr) {
      for_each_segment([this](int64_t segment) { add_bias_sums(segment); });
    }
  }

 private:
  template <class Body>
  void for_each_segment(const Body& body) const {
    const int64_t grain = GRAIN / (CROSS_ENTROPY_SEGMENT * p_.rows) + 1;
    parallel_for(segments_, grain, p_.threads, [&](int64_t begin, int64_t end) {
      for (int64_t segment = begin; segment < end; ++segment) body(segment);
    });
  }

  float* segment_values(int64_t segment) const { return partial_ + segment * p_.rows; }
  float bias(int64_t c) const { return p_.bias != nullptr ? p_.bias[c] : 0.0f; }

  // Calls body(first class, number of classes, up to 4) over the classes of a segment: each row's statistics are loaded
  // and stored once for all of them.
  template <class Body>
  void for_each_group(int64_t segment, const Body& body) const {
    const int64_t begin = segment * CROSS_ENTROPY_SEGMENT;
    const int64_t end = begin + CROSS_ENTROPY_SEGMENT < p_.classes ? begin + CROSS_ENTROPY_SEGMENT : p_.classes;
    int64_t c = begin;
    for (; c + 4 <= end; c += 4) body(c, Count<4>());
    for (; c < end; ++c) body(c, Count<1>());
  }
  template <int COUNT>
  struct Count {};

  void find_maxima(int64_t segment) const {
    float* maxima = segment_values(segment);
    for (int64_t r = 0; r < p_.rows; ++r) maxima[r] = -INFINITY_FLOAT;
    for_each_group(segment, [&](int64_t c, auto count) { group_maxima(c, count, maxima); });
  }

  template <int COUNT>
  void group_maxima(int64_t c, Count<COUNT>, float* maxima) const {
    Vector shift[COUNT];
    for (int i = 0; i < COUNT; ++i) shift[i] = broadcast(bias(c + i));
    for (int64_t r = 0; r < p_.rows; r += Vector::width) {
      const int64_t left = p_.rows - r;
      Vector largest = load_first(maxima + r, left);
      for (int i = 0; i < COUNT; ++i) {
        largest = maximum(largest, load_first(p_.logits + (c + i) * p_.rows + r, left) + shift[i]);
      }
      store_first(maxima + r, left, largest);
    }
  }

  // Each row's maximum over all segments, and how far below it its target's logit lies.
  void choose_targets() const {
    for (int64_t r = 0; r < p_.rows; ++r) {
      float largest = segment_values(0)[r];
      for (int64_t segment = 1; segment < segments_; ++segment) {
        const float x = segment_values(segment)[r];
        largest = x > largest ? x : largest;
      }
      largest_[r] = largest;
      const int64_t target = p_.target[r * p_.target_stride];
      const bool is_class = 0 <= target && target < p_.classes;
      chosen_[r] = is_class ? p_.logits[target * p_.rows + r] + bias(target) - largest : NOT_A_NUMBER;
      kept_[r] = target == p_.ignore_index ? 0.0f : 1.0f;
    }
  }

  template <bool STORE>
  void exponentials(int64_t segment) const {
    float* sums = segment_values(segment);
    for (int64_t r = 0; r < p_.rows; ++r) sums[r] = 0.0f;
    for_each_group(segment, [&](int64_t c, auto count) { group_exponentials<STORE>(c, count, sums); });
  }

  template <bool STORE, int COUNT>
  void group_exponentials(int64_t c, Count<COUNT>, float* sums) const {
    const Vector one = broadcast(1.0f);
    Vector shift[COUNT];
    for (int i = 0; i < COUNT; ++i) shift[i] = broadcast(bias(c + i));
    for (int64_t r = 0; r < p_.rows; r += Vector::width) {
      const int64_t left = p_.rows - r;
      const Vector largest = load_first(largest_ + r, left), kept = load_first(kept_ + r, left);
      Vector sum[COUNT];
      for (int i = 0; i < COUNT; ++i) {
        float* x = p_.logits + (c + i) * p_.rows + r;
        const Vector y = exponential(load_first(x, left) + shift[i] - largest);
        sum[i] = zero_where_less(y, kept, one);  // also where an ignored row's is NaN
        if (STORE) store_first(x, left, sum[i]);
      }
      for (int step = COUNT / 2; step > 0; step /= 2) {
        for (int i = 0; i < step; ++i) sum[i] = sum[i] + sum[i + step];
      }
      store_first(sums + r, left, load_first(sums + r, left) + sum[0]);
    }
  }

  void finish_rows() const {
    double total = 0;
    for (int64_t r = 0; r < p_.rows; ++r) {
      const bool kept = kept_[r] != 0;
      double sum = 0;
      for (int64_t segment = 0; segment < segments_; ++segment) sum += segment_values(segment)[r];
      const float loss = kept ? static_cast<float>(__builtin_log(sum) - chosen_[r]) : 0.0f;
      if (p_.loss != nullptr) p_.loss[r] = loss;
      total += loss;
      if (p_.row_scale == nullptr) continue;
      const int64_t target = p_.target[r * p_.target_stride];
      const bool is_class = 0 <= target && target < p_.classes;
      const double factor = (is_class ? p_.row_scale[r * p_.row_scale_stride] : NOT_A_NUMBER) / sum;
      const float rounded = static_cast<float>(factor);
      p_.row_factor[r] = kept ? rounded : 0.0f;
      if (!kept || !is_class) continue;
      // The target's is the largest gradient by far: it makes up for the rounding of the factor.
      float& x = p_.logits[target * p_.rows + r];
      x = static_cast<float>((x - sum) * (rounded != 0 ? factor / rounded : 1.0));
    }
    *p_.total += total;
  }

  // In double, and in eight sums at once: what a class gets from thousands of rows would blur in one float.
  void add_bias_sums(int64_t segment) const {
    const int64_t begin = segment * CROSS_ENTROPY_SEGMENT;
    for (int64_t c = begin; c < begin + CROSS_ENTROPY_SEGMENT && c < p_.classes; ++c) {
      const float* __restrict x = p_.logits + c * p_.rows;
      const float* __restrict factor = p_.row_factor;
      double sums[8] = {};
      int64_t r = 0;
      for (; r + 8 <= p_.rows; r += 8) {
        for (int i = 0; i < 8; ++i) sums[i] += static_cast<double>(x[r + i]) * factor[r + i];
      }
      for (; r < p_.rows; ++r) sums[0] += static_cast<double>(x[r]) * factor[r];
      for (int i = 1; i < 8; ++i) sums[0] += sums[i];
      p_.bias_sums[c] += sums[0];
    }
  }

  const CrossEntropyChunk& p_;
  int64_t segments_;
  float* largest_;
  float* chosen_;  // the target's logit less the maximum
  float* kept_;    // 1, or 0 in a row that is ignored
  float* partial_;  // [segments, rows]: maxima, then sums
};

// The upper 24 bits of a float32, rounded to nearest.
void split(float x, uint16_t& high, uint8_t& low) {
  const uint32_t bits = bits_of(x);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const uint32_t rounded = nan ? bits | 0x400000u : bits + 0x7fu + ((bits >> 8) & 1u);
  high = static_cast<uint16_t>(rounded >> 16);
  low = static_cast<uint8_t>(rounded >> 8);
}

float joined(uint16_t high, uint8_t low) {
  return float_of(static_cast<uint32_t>(high) << 16 | static_cast<uint32_t>(low) << 8);
}

template <class T>
const char* sum_last(const GradientSum& p) {
  parallel_for(p.count, GRAIN, p.threads, [&](int64_t begin, int64_t end) {
    T* __restrict gradient = reinterpret_cast<T*>(p.gradient);
    const float* __restrict term = p.term;
    const uint8_t* __restrict low = p.low;
    if (p.first) {
      for (int64_t i = begin; i < end; ++i) from_float(term[i], gradient[i]);
    } else {
      for (int64_t i = begin; i < end; ++i) from_float(term[i] + joined(gradient[i].bits, low[i]), gradient[i]);
    }
  });
  return nullptr;
}

const char* sum_more(const GradientSum& p) {
  parallel_for(p.count, GRAIN, p.threads, [&](int64_t begin, int64_t end) {
    const float* __restrict term = p.term;
    uint16_t* __restrict high = p.gradient;
    uint8_t* __restrict low = p.low;
    if (p.first) {
      for (int64_t i = begin; i < end; ++i) split(term[i], high[i], low[i]);
    } else {
      for (int64_t i = begin; i < end; ++i) split(term[i] + joined(high[i], low[i]), high[i], low[i]);
    }
  });
  return nullptr;
}

template <class T>
const char* scale_all(const GradientScale& p) {
  parallel_for(p.count, GRAIN, p.threads, [&](int64_t begin, int64_t end) {
    const T* __restrict input = static_cast<const T*>(p.input);
    T* __restrict output = static_cast<T*>(p.output);
    const float factor = *p.factor;
    for (int64_t i = begin; i < end; ++i) from_float(to_float(input[i]) * factor, output[i]);
  });
  return nullptr;
}

}  // namespace

const char* cross_entropy_chunk(const CrossEntropyChunk& p) {
  if (p.rows == 0) return nullptr;
  if (p.classes == 0) return "expected at least one class";
  Chunk(p).run();
  return nullptr;
}

const char* gradient_sum(const GradientSum& p) {
  if (!p.last) return sum_more(p);
  switch (p.dtype) {
    case Dtype::float16: return sum_last<Half>(p);
    case Dtype::bfloat16: return sum_last<BFloat16>(p);
    default: return "expected float16 or bfloat16";
  }
}

const char* gradient_scale(const GradientScale& p) {
  switch (p.dtype) {
    case Dtype::float32: return scale_all<float>(p);
    case Dtype::float16: return scale_all<Half>(p);
    case Dtype::bfloat16: return scale_all<BFloat16>(p);
    default: return "expected float32, float16 or bfloat16";
  }
}

}  // namespace dalle::DALLE_ISA_NAMESPACE
