#include "gumbel_softmax/gumbel_softmax.h"

#include "common/cuda.h"
#include "common/pack.h"
#include "gumbel_softmax/noise.h"

namespace dalle::cuda {
namespace {

// A thread's elements: GROUPS groups of four columns of one row, each the columns of a Philox counter.
constexpr int GROUP = 4;
template <int GROUPS>
using Elements = float[GROUPS][GROUP];

constexpr int WARP = 32, MOST_WARPS = 32;

// Where a row begins.
__device__ __forceinline__ int64_t row_place(const Strided& rows, int64_t row) {
  int64_t place = 0;
  for (int d = rows.dims - 1; d > 0; --d) {
    place += row % rows.sizes[d] * rows.strides[d];
    row /= rows.sizes[d];
  }
  return place + row * rows.strides[0];
}

// A block that owns a row, which lies in its registers.
template <class T, int GROUPS>
class RowBlock {
 public:
  using Columns = Elements<GROUPS>;

  __device__ __forceinline__ explicit RowBlock(int64_t columns) : columns_(static_cast<int>(columns)) {}

  static __device__ __forceinline__ int64_t row() { return blockIdx.x; }

  // The first column of a group.
  static __device__ __forceinline__ int column(int group) {
    constexpr int IN_PACK = PACK / GROUP;
    return ((group / IN_PACK) * blockDim.x + threadIdx.x) * PACK + (group % IN_PACK) * GROUP;
  }

  // Beyond the last column, `other`.
  __device__ __forceinline__ void load(const RowTensor& tensor, float other, Columns& values) const {
    const T* data = place(tensor);
    if (is_whole(tensor, data)) {
#pragma unroll
      for (int group = 0; group < GROUPS; group += PACK / GROUP) {
        float numbers[PACK];
#pragma unroll
        for (float& number : numbers) number = other;
        if (column(group) < columns_) numbers_of(load_pack<PACK>(data + column(group), 0), numbers);
#pragma unroll
        for (int i = 0; i < PACK; ++i) values[group + i / GROUP][i % GROUP] = numbers[i];
      }
    } else {
#pragma unroll
      for (int group = 0; group < GROUPS; ++group) {
#pragma unroll
        for (int i = 0; i < GROUP; ++i) {
          const int at = column(group) + i;
          values[group][i] = at < columns_ ? number_of(data[at * tensor.column_stride]) : other;
        }
      }
    }
  }

  __device__ __forceinline__ void store(const RowTensor& tensor, const Columns& values) const {
    T* data = place(tensor);
    if (is_whole(tensor, data)) {
#pragma unroll
      for (int group = 0; group < GROUPS; group += PACK / GROUP) {
        float numbers[PACK];
#pragma unroll
        for (int i = 0; i < PACK; ++i) numbers[i] = values[group + i / GROUP][i % GROUP];
        if (column(group) < columns_) store_pack(data + column(group), 0, rounded_pack<T>(numbers));
      }
    } else {
#pragma unroll
      for (int group = 0; group < GROUPS; ++group) {
#pragma unroll
        for (int i = 0; i < GROUP; ++i) {
          const int at = column(group) + i;
          const float number[1] = {values[group][i]};
          if (at < columns_) data[at * tensor.column_stride] = rounded_pack<T>(number).elements[0];
        }
      }
    }
  }

  // The row's number in a tensor of one column.
  static __device__ __forceinline__ float number(const RowTensor& tensor) {
    return static_cast<const float*>(tensor.data)[row_place(tensor.rows, row())];
  }

  // Each of the numbers over all threads, by a tree that is always the same. Where a kernel comes here, it is the same
  // for all of its threads, and each time to another `shared`.
  template <int COUNT, class Operation>
  static __device__ __forceinline__ void reduce(float (&numbers)[COUNT], float (&shared)[COUNT][MOST_WARPS],
                                                const Operation& operation, float neutral) {
    const int warps = blockDim.x / WARP, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    reduce_warp<WARP>(numbers, operation);
    if (warps == 1) return;
    if (lane == 0) {
#pragma unroll
      for (int i = 0; i < COUNT; ++i) shared[i][warp] = numbers[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < COUNT; ++i) numbers[i] = lane < warps ? shared[i][lane] : neutral;
    reduce_warp<WARP>(numbers, operation);
  }

 private:
  static constexpr int PACK = pack_size<T>();

  template <int LANES, int COUNT, class Operation>
  static __device__ __forceinline__ void reduce_warp(float (&numbers)[COUNT], const Operation& operation) {
#pragma unroll
    for (int distance = LANES / 2; distance > 0; distance /= 2) {
#pragma unroll
      for (float& number : numbers) number = operation(number, __shfl_xor_sync(0xffffffffu, number, distance));
    }
  }

  static __device__ __forceinline__ T* place(const RowTensor& tensor) {
    return static_cast<T*>(tensor.data) + row_place(tensor.rows, row());
  }

  // Whether the row is made of whole packs.
  __device__ __forceinline__ bool is_whole(const RowTensor& tensor, const T* data) const {
    return tensor.column_stride == 1 && columns_ % PACK == 0 && are_aligned(data);
  }

  int columns_;
};

struct Largest {
  // Passes over NaN, which sums do not.
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};
struct Sum {
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};

template <int GROUPS>
__device__ __forceinline__ float largest_of(const Elements<GROUPS>& values) {
  float largest = -INFINITY;
#pragma unroll
  for (int group = 0; group < GROUPS; ++group) {
#pragma unroll
    for (int i = 0; i < GROUP; ++i) largest = fmaxf(largest, values[group][i]);
  }
  return largest;
}

// Exponents of 2 that give a softmax: values * scale, less those of the row's largest. One rounding an element, so what
// is lost in the product of the largest is lost to all alike.
struct Exponent {
  float scale, shift;
  // Nothing is subtracted where there is nothing but -inf.
  __device__ __forceinline__ Exponent(float scale_, float largest)
      : scale(scale_), shift(largest == -INFINITY ? 0.0f : -largest * scale_) {}
  __device__ __forceinline__ float operator()(float value) const { return fmaf(value, scale, shift); }
};

// The posterior's ln q but for a constant, in bits; bounded below where q is 0, so that 0 * log 0 is 0.
__device__ __forceinline__ float bounded(float exponent) { return fmaxf(exponent, -1000.0f); }

// logits + gumbel, in place of the logits.
template <class Team, int GROUPS>
__device__ __forceinline__ void add_noise(const GumbelNoise& noise, const Team& team, Elements<GROUPS>& scores) {
  const RowNoise row(*noise.seed, *noise.offset + team.row());
#pragma unroll
  for (int group = 0; group < GROUPS; ++group) {
    float logs[GROUP];
    row.log2_exponentials(team.column(group) / GROUP, logs);
#pragma unroll
    for (int i = 0; i < GROUP; ++i) scores[group][i] = fmaf(logs[i], -LN_2, scores[group][i]);
  }
}

template <int GROUPS>
__device__ __forceinline__ void copy(const Elements<GROUPS>& from, Elements<GROUPS>& to) {
#pragma unroll
  for (int group = 0; group < GROUPS; ++group) {
#pragma unroll
    for (int i = 0; i < GROUP; ++i) to[group][i] = from[group][i];
  }
}

// The exponentials of a soft sample in place of its scores; returns their sum.
template <int GROUPS>
__device__ __forceinline__ float exponentiate(const Exponent& exponent, Elements<GROUPS>& scores) {
  float sum = 0.0f;
#pragma unroll
  for (int group = 0; group < GROUPS; ++group) {
    float part[GROUP];
#pragma unroll
    for (int i = 0; i < GROUP; ++i) scores[group][i] = part[i] = fast_exp2(exponent(scores[group][i]));
    sum += (part[0] + part[1]) + (part[2] + part[3]);
  }
  return sum;
}

// The sums that the posterior and its KL are made of: of exponentials, and of these times their logarithms.
template <int GROUPS>
__device__ __forceinline__ void add_posterior(const Exponent& exponent, const Elements<GROUPS>& logits, float& total,
                                              float& moment) {
#pragma unroll
  for (int group = 0; group < GROUPS; ++group) {
    float part[GROUP];
#pragma unroll
    for (int i = 0; i < GROUP; ++i) {
      const float exponent_of_q = exponent(logits[group][i]);
      part[i] = fast_exp2(exponent_of_q);
      moment = fmaf(part[i], bounded(exponent_of_q), moment);
    }
    total += (part[0] + part[1]) + (part[2] + part[3]);
  }
}

// Of total / columns, since that is near 1 where the KL is near 0.
__device__ __forceinline__ float divergence(float total, float moment, int64_t columns) {
  const float kl = (moment / total - log2f(total / static_cast<float>(columns))) * LN_2;
  return kl < 0.0f ? 0.0f : kl;
}

constexpr int FORWARD_GROUPS = 4, MOST_THREADS = 1024;

template <class T, bool WITH_KL>
__global__ void __launch_bounds__(MOST_THREADS) forward(const __grid_constant__ GumbelSoftmax p) {
  using Team = RowBlock<T, FORWARD_GROUPS>;
  __shared__ float largest_shared[1 + WITH_KL][MOST_WARPS], index_shared[1][MOST_WARPS],
      sums_shared[1 + 2 * WITH_KL][MOST_WARPS];
  const Team team(p.columns);
  typename Team::Columns logits, scores;
  team.load(p.logits, -INFINITY, logits);
  copy<FORWARD_GROUPS>(logits, scores);
  add_noise(p.noise, team, scores);

  float largest[1 + WITH_KL] = {largest_of<FORWARD_GROUPS>(scores)};
  if constexpr (WITH_KL) largest[1] = largest_of<FORWARD_GROUPS>(logits);
  team.reduce(largest, largest_shared, Largest(), -INFINITY);

  float chosen[1] = {-INFINITY};  // less the first column with the largest score
  if (p.hard) {
#pragma unroll
    for (int group = 0; group < FORWARD_GROUPS; ++group) {
#pragma unroll
      for (int i = 0; i < GROUP; ++i) {
        if (scores[group][i] == largest[0]) chosen[0] = fmaxf(chosen[0], -static_cast<float>(team.column(group) + i));
      }
    }
    team.reduce(chosen, index_shared, Largest(), -INFINITY);
  }

  float sums[1 + 2 * WITH_KL] = {exponentiate<FORWARD_GROUPS>(Exponent(LOG2_E / *p.noise.tau, largest[0]), scores)};
  if constexpr (WITH_KL) add_posterior<FORWARD_GROUPS>(Exponent(LOG2_E, largest[1]), logits, sums[1], sums[2]);
  team.reduce(sums, sums_shared, Sum(), 0.0f);
  if constexpr (WITH_KL) {
    if (threadIdx.x == 0) p.kl[team.row()] = divergence(sums[1], sums[2], p.columns);
  }

  // A row that holds NaN or +inf, or nothing but -inf, has a sum of NaN or 0 and is NaN.
  const float inverse = 1.0f / sums[0];
#pragma unroll
  for (int group = 0; group < FORWARD_GROUPS; ++group) {
#pragma unroll
    for (int i = 0; i < GROUP; ++i) {
      const float one_hot = (static_cast<float>(team.column(group) + i) == -chosen[0] ? 1.0f : 0.0f) + inverse * 0.0f;
      scores[group][i] = p.hard ? one_hot : scores[group][i] * inverse;
    }
  }
  team.store(p.y, scores);
}

constexpr int BACKWARD_GROUPS = 4, MOST_BACKWARD_THREADS = 512;

// The soft sample is `y`; where that is a one-hot it is drawn again.
template <class T, bool WITH_KL, bool HARD>
__global__ void __launch_bounds__(MOST_BACKWARD_THREADS) backward(const __grid_constant__ GumbelSoftmaxBackward p) {
  using Team = RowBlock<T, BACKWARD_GROUPS>;
  constexpr int LARGEST = WITH_KL + HARD, SUMS = 1 + HARD + 2 * WITH_KL;
  __shared__ float largest_shared[LARGEST + 1][MOST_WARPS], sums_shared[SUMS][MOST_WARPS];
  const Team team(p.columns);
  typename Team::Columns gradient, logits, sample;
  team.load(p.grad_y, 0.0f, gradient);
  if constexpr (WITH_KL || HARD) team.load(p.logits, -INFINITY, logits);
  if constexpr (!HARD) team.load(p.y, 0.0f, sample);
  if constexpr (HARD) {
    copy<BACKWARD_GROUPS>(logits, sample);
    add_noise(p.noise, team, sample);
  }

  float largest[LARGEST + 1];  // of the logits and the scores
  if constexpr (WITH_KL) largest[0] = largest_of<BACKWARD_GROUPS>(logits);
  if constexpr (HARD) largest[LARGEST - 1] = largest_of<BACKWARD_GROUPS>(sample);
  largest[LARGEST] = 0.0f;
  if constexpr (LARGEST > 0) team.reduce(largest, largest_shared, Largest(), -INFINITY);

  const float inverse_tau = 1.0f / *p.noise.tau;
  float sums[SUMS] = {0.0f};  // of y * grad_y, then those of the posterior, then that of a sample drawn again
  if constexpr (HARD) {
    sums[SUMS - 1] = exponentiate<BACKWARD_GROUPS>(Exponent(LOG2_E / *p.noise.tau, largest[LARGEST - 1]), sample);
  }
#pragma unroll
  for (int group = 0; group < BACKWARD_GROUPS; ++group) {
#pragma unroll
    for (int i = 0; i < GROUP; ++i) sums[0] = fmaf(sample[group][i], gradient[group][i], sums[0]);
  }
  const Exponent exponent(LOG2_E, WITH_KL ? largest[0] : 0.0f);
  if constexpr (WITH_KL) add_posterior<BACKWARD_GROUPS>(exponent, logits, sums[1], sums[2]);
  team.reduce(sums, sums_shared, Sum(), 0.0f);

  const float inverse = HARD ? 1.0f / sums[SUMS - 1] : 1.0f, dot = sums[0] * inverse;
  float weight = 0.0f, mean = 0.0f;
  if constexpr (WITH_KL) {
    weight = team.number(p.grad_kl) / sums[1] * LN_2;
    mean = sums[2] / sums[1];
  }
#pragma unroll
  for (int group = 0; group < BACKWARD_GROUPS; ++group) {
#pragma unroll
    for (int i = 0; i < GROUP; ++i) {
      float result = sample[group][i] * inverse * (gradient[group][i] - dot) * inverse_tau;
      if constexpr (WITH_KL) {
        const float exponent_of_q = exponent(logits[group][i]);
        result = fmaf(fast_exp2(exponent_of_q) * weight, bounded(exponent_of_q) - mean, result);
      }
      gradient[group][i] = result;
    }
  }
  team.store(p.grad_logits, gradient);
}

constexpr const char* TOO_LONG = "a row does not fit the registers of a block";

// The threads of a block that owns a row of so many columns.
constexpr int threads_of(int64_t columns, int groups) {
  const int64_t threads = (columns + groups * GROUP - 1) / (groups * GROUP);
  return static_cast<int>((threads + WARP - 1) / WARP * WARP);
}

RowTensor with_merged_rows(const RowTensor& tensor) {
  return {tensor.data, plain::merged(tensor.rows), tensor.column_stride};
}

template <class T>
const char* forward_all(const GumbelSoftmax& p, unsigned rows, cudaStream_t stream) {
  const int threads = threads_of(p.columns, FORWARD_GROUPS);
  if (p.kl != nullptr) {
    forward<T, true><<<rows, threads, 0, stream>>>(p);
  } else {
    forward<T, false><<<rows, threads, 0, stream>>>(p);
  }
  return launch_status();
}

template <class T, bool WITH_KL>
const char* backward_all(const GumbelSoftmaxBackward& p, unsigned rows, cudaStream_t stream) {
  const int threads = threads_of(p.columns, BACKWARD_GROUPS);
  if (p.hard) {
    backward<T, WITH_KL, true><<<rows, threads, 0, stream>>>(p);
  } else {
    backward<T, WITH_KL, false><<<rows, threads, 0, stream>>>(p);
  }
  return launch_status();
}

template <class T>
const char* backward_all(const GumbelSoftmaxBackward& p, unsigned rows, cudaStream_t stream) {
  return p.grad_kl.data != nullptr ? backward_all<T, true>(p, rows, stream) : backward_all<T, false>(p, rows, stream);
}

}  // namespace

const char* gumbel_softmax(const GumbelSoftmax& call, void* stream) {
  GumbelSoftmax p = call;
  p.logits = with_merged_rows(call.logits);
  p.y = with_merged_rows(call.y);
  const unsigned rows = static_cast<unsigned>(plain::element_count(p.logits.rows));
  if (rows == 0) return nullptr;
  if (p.columns > MOST_THREADS * FORWARD_GROUPS * GROUP) return TOO_LONG;
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  switch (p.dtype) {
    case Dtype::float32: return forward_all<float>(p, rows, s);
    case Dtype::float16: return forward_all<Half>(p, rows, s);
    case Dtype::bfloat16: return forward_all<BFloat16>(p, rows, s);
    default: return "unknown dtype";
  }
}

const char* gumbel_softmax_backward(const GumbelSoftmaxBackward& call, void* stream) {
  GumbelSoftmaxBackward p = call;
  for (RowTensor* tensor : {&p.grad_y, &p.logits, &p.y, &p.grad_kl, &p.grad_logits}) {
    *tensor = with_merged_rows(*tensor);
  }
  const unsigned rows = static_cast<unsigned>(plain::element_count(p.logits.rows));
  if (rows == 0) return nullptr;
  if (p.columns > MOST_BACKWARD_THREADS * BACKWARD_GROUPS * GROUP) return TOO_LONG;
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  switch (p.dtype) {
    case Dtype::float32: return backward_all<float>(p, rows, s);
    case Dtype::float16: return backward_all<Half>(p, rows, s);
    case Dtype::bfloat16: return backward_all<BFloat16>(p, rows, s);
    default: return "unknown dtype";
  }
}

}  // namespace dalle::cuda
