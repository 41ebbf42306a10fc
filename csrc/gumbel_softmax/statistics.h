// What the threads of a row add up: sums of exponentials, relative to the largest exponent seen so far, so that a
// thread can add its columns before it knows those of the others. CUDA only.
#pragma once

#include "gumbel_softmax/noise.h"
#include "gumbel_softmax/team.h"

namespace dalle::cuda {

// 2^(value * scale - base). The base is the largest exponent, rounded so that numbers relative to different bases
// differ by a power of two, which costs them nothing; and 0 while there is nothing but -inf.
struct Exponent {
  float scale, base;
  __device__ __forceinline__ Exponent(float scale_, float largest)
      : scale(scale_), base(largest == -INFINITY ? 0.0f : rintf(largest * scale_)) {}
  __device__ __forceinline__ float operator()(float value) const { return fmaf(value, scale, -base); }
};

// What sums relative to `from` are multiplied with to be relative to `to`, as an exponent and as itself.
__device__ __forceinline__ float step_of(float from, float to, float scale) {
  return Exponent(scale, from).base - Exponent(scale, to).base;
}
__device__ __forceinline__ float carry_of(float from, float to, float scale) {
  return from == -INFINITY ? 0.0f : fast_exp2(step_of(from, to, scale));
}

// The posterior's ln q but for a constant, in bits; bounded below where q is 0, so that 0 * log 0 is 0.
__device__ __forceinline__ float bounded(float exponent) { return fmaxf(exponent, -1000.0f); }

template <int GROUPS>
__device__ __forceinline__ float largest_of(const Elements<GROUPS>& values) {
  // Passes over NaN, which sums do not.
  float largest = -INFINITY;
#pragma unroll
  for (int group = 0; group < GROUPS; ++group) {
#pragma unroll
    for (int i = 0; i < GROUP; ++i) largest = fmaxf(largest, values[group][i]);
  }
  return largest;
}

// DRAWN sums of the exponentials of noisy scores / tau and of products with them, PLAIN sums that are relative to
// nothing, and for the POSTERIOR, the softmax of the logits, sums of exponentials and of these times their exponents.
template <int DRAWN, int PLAIN, bool POSTERIOR>
struct Statistics {
  static constexpr int LARGEST = (DRAWN > 0) + POSTERIOR, SUMS = DRAWN + PLAIN + 2 * POSTERIOR;
  // Where the posterior has its numbers.
  static constexpr int OF_LOGITS = LARGEST - 1, TOTAL = SUMS - 2, MOMENT = SUMS - 1;

  float scale;  // log2(e) / tau
  float largest[LARGEST > 0 ? LARGEST : 1], sums[SUMS];

  __device__ __forceinline__ explicit Statistics(float scale_) : scale(scale_) { clear(); }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (float& number : largest) number = -INFINITY;
#pragma unroll
    for (float& sum : sums) sum = 0.0f;
  }

  // To larger maxima.
  __device__ __forceinline__ void rescale(const float (&to)[LARGEST > 0 ? LARGEST : 1]) {
    if constexpr (DRAWN > 0) {
      const float carry = carry_of(largest[0], to[0], scale);
#pragma unroll
      for (int i = 0; i < DRAWN; ++i) sums[i] *= carry;
      largest[0] = to[0];
    }
    if constexpr (POSTERIOR) {
      const float step = step_of(largest[OF_LOGITS], to[OF_LOGITS], LOG2_E);
      const float carry = carry_of(largest[OF_LOGITS], to[OF_LOGITS], LOG2_E);
      sums[MOMENT] = carry * fmaf(sums[TOTAL], step, sums[MOMENT]);
      sums[TOTAL] *= carry;
      largest[OF_LOGITS] = to[OF_LOGITS];
    }
  }

  // Those of other columns.
  __device__ __forceinline__ void add(Statistics other) {
    float to[LARGEST > 0 ? LARGEST : 1] = {0.0f};
#pragma unroll
    for (int i = 0; i < LARGEST; ++i) to[i] = fmaxf(largest[i], other.largest[i]);
    rescale(to);
    other.rescale(to);
#pragma unroll
    for (int i = 0; i < SUMS; ++i) sums[i] += other.sums[i];
  }

  // The columns of a thread, before any others.
  template <int GROUPS>
  __device__ __forceinline__ void add_posterior(const Elements<GROUPS>& logits) {
    largest[OF_LOGITS] = largest_of<GROUPS>(logits);
    const Exponent exponent(LOG2_E, largest[OF_LOGITS]);
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
      float part[GROUP];
#pragma unroll
      for (int i = 0; i < GROUP; ++i) {
        const float of_q = exponent(logits[group][i]);
        part[i] = fast_exp2(of_q);
        sums[MOMENT] = fmaf(part[i], bounded(of_q), sums[MOMENT]);
      }
      sums[TOTAL] += (part[0] + part[1]) + (part[2] + part[3]);
    }
  }
};

// The largest number of all.
struct LargestNumber {
  static constexpr int LARGEST = 1, SUMS = 0;
  float largest[1], sums[1];

  __device__ __forceinline__ void clear() { largest[0] = -INFINITY; }
  __device__ __forceinline__ void rescale(const float (&to)[1]) { largest[0] = to[0]; }
  __device__ __forceinline__ void add(const LargestNumber& other) { largest[0] = fmaxf(largest[0], other.largest[0]); }
};

}  // namespace dalle::cuda
