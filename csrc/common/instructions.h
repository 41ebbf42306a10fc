// Instructions of a GPU that C++ has no name for. CUDA only.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace dalle::cuda {

// Both words of a product, by one instruction, which the compiler makes into two of a product of 64 bits.
__device__ __forceinline__ void multiply_wide(uint32_t a, uint32_t b, uint32_t& low, uint32_t& high) {
  asm("{ .reg .u64 product; mul.wide.u32 product, %2, %3; mov.b64 {%0, %1}, product; }"
      : "=r"(low), "=r"(high)
      : "r"(a), "r"(b));
}

// Of the special function unit: off by 2^-22 of the result, a reciprocal by one unit in the last place, a logarithm
// between 1/2 and 2 by 2^-22. Subnormal numbers are 0, given and returned.
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float fast_log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float fast_reciprocal_root(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A number in the bits of a float16, and a number's neighbour towards 0 in such bits.
__device__ __forceinline__ float float_of_half(uint16_t bits) {
  float number;
  asm("cvt.f32.f16 %0, %1;" : "=f"(number) : "h"(bits));
  return number;
}
__device__ __forceinline__ uint16_t half_towards_zero(float x) {
  uint16_t bits;
  asm("cvt.rz.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

}  // namespace dalle::cuda
