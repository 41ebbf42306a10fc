// Pairs of 16-bit numbers in a register, the first of each in the lower half: picked apart they cost an instruction
// more.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/dtype.h"

namespace dalle::cuda {

struct alignas(16) FourPairs {
  uint32_t pairs[4];
};

// Two numbers, each rounded to nearest even; NaN stays NaN.
__device__ __forceinline__ uint32_t rounded_pair(float first, float second, BFloat16) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}
__device__ __forceinline__ uint32_t rounded_pair(float first, float second, Half) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

__device__ __forceinline__ float2 numbers_of(uint32_t pair, BFloat16) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}
__device__ __forceinline__ float2 numbers_of(uint32_t pair, Half) {
  float2 numbers;
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}"
      : "=f"(numbers.x), "=f"(numbers.y)
      : "r"(pair));
  return numbers;
}

template <class Element>
__device__ __forceinline__ FourPairs rounded_pairs(const float (&numbers)[8], Element) {
  FourPairs rounded;
#pragma unroll
  for (int i = 0; i < 4; ++i) rounded.pairs[i] = rounded_pair(numbers[2 * i], numbers[2 * i + 1], Element{});
  return rounded;
}
template <class Element>
__device__ __forceinline__ void numbers_of(const FourPairs& four, float (&numbers)[8], Element) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 two = numbers_of(four.pairs[i], Element{});
    numbers[2 * i] = two.x, numbers[2 * i + 1] = two.y;
  }
}

// Number WHICH of each of two pairs, as a pair.
template <int WHICH>
__device__ __forceinline__ uint32_t pair_of(uint32_t first, uint32_t second) {
  return __byte_perm(first, second, WHICH == 0 ? 0x5410 : 0x7632);
}

}  // namespace dalle::cuda
