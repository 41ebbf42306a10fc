// The Gumbel noise for CUDA kernels, as dalle_kernels/philox.py defines it. CUDA only.
//
// A draw is -ln E but for rounding, E = -ln(1 - v) being exponential. The uniform number v is the definition's bit for
// bit. ln E = ln v + ln(E / v), of which the second is smooth: below v = 1/2 a polynomial, and from there, where 1 - v
// is exact, ln E is taken of a logarithm. The special function unit's logarithm errs by 2^-22 between 1/2 and 2 and by
// two units in the last place beyond: as much as rounding does to a score of some units.
//
// Cost an element: 10 instructions for a quarter of Philox, 3 for the uniform number, 12 for ln E, two of them of the
// special function unit.
#pragma once

#include "common/philox_cuda.h"

namespace dalle::cuda {

constexpr float LN_2 = 0.693147181f, LOG2_E = 1.44269504f;

// The noise of one row.
class RowNoise {
 public:
  __device__ __forceinline__ RowNoise(uint64_t seed, uint64_t row) : philox_(seed, row, PHILOX_USE_GUMBEL) {}

  // log2 E of the columns 4 * group to 4 * group + 3.
  __device__ __forceinline__ void log2_exponentials(uint32_t group, float (&logs)[4]) const {
    uint32_t words[PHILOX_WORDS];  // their complements, 2^32 - 1 - bits
    philox_.words<0xffffffffu>(group, words);
#pragma unroll
    for (int i = 0; i < 4; ++i) logs[i] = log2_exponential(complement_uniform(words[i]));
  }

 private:
  // v, 2^-33 <= v <= 1 - 2^-24.
  static __device__ __forceinline__ float complement_uniform(uint32_t word) {
    return fminf(fmaf(__uint2float_rn(word), 0x1p-32f, 0x1p-33f), 1.0f - 0x1p-24f);
  }

  static __device__ __forceinline__ float log2_exponential(float v) {
    const bool large = v >= 0.5f;
    const float x = large ? 1.0f - v : v, log = fast_log2(x);
    // log2(E / v) / v up to 1/2, to 2^-23.5 in the product with v.
    float ratio = 0.535807729f;
    ratio = fmaf(ratio, x, -0.464616179f);
    ratio = fmaf(ratio, x, 0.365758061f);
    ratio = fmaf(ratio, x, 0.0558580905f);
    ratio = fmaf(ratio, x, 0.189696401f);
    ratio = fmaf(ratio, x, 0.299976677f);
    ratio = fmaf(ratio, x, 0.721359789f);
    const float of_large = fast_log2(log * -LN_2), of_small = fmaf(ratio, x, log);  // no branch, which would cost more
    return large ? of_large : of_small;
  }

  PhiloxRow philox_;
};

}  // namespace dalle::cuda
