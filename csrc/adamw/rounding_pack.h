// The rounding of rounding.h on the packs of a CUDA kernel: the same bits without a division and without double.
#pragma once

#include "common/pack.h"
#include "common/philox_cuda.h"

namespace dalle::cuda {

// The neighbour of x towards 0. No finite number becomes infinite, none that is not becomes finite.
__device__ __forceinline__ uint32_t bits_towards(float x, BFloat16) { return __float_as_uint(x) >> 16; }
__device__ __forceinline__ uint32_t bits_towards(float x, Half) { return half_towards_zero(x); }

// How far x lies from there to its neighbour away from 0, in 2^-32 of that distance, rounded up: as whole numbers are
// below a number where they are below the next whole one, words below this, and no others, round x away from 0. What is
// dropped of a normal number's significand is that distance. From the largest finite number on it is 0.
__device__ __forceinline__ uint32_t words_away(float x, BFloat16) {
  const uint32_t bits = __float_as_uint(x);
  return (bits & 0x7fffffffu) < 0x7f7f0000u ? bits << 16 : 0;
}
__device__ __forceinline__ uint32_t words_away(float x, Half) {
  const uint32_t bits = __float_as_uint(x), magnitude = bits & 0x7fffffffu;
  const float steps = fabsf(x) * 0x1p24f;  // of Half's subnormals
  const uint32_t subnormal = __float2uint_ru((steps - truncf(steps)) * 0x1p32f);
  return magnitude < 0x38800000u ? subnormal : magnitude < 0x477fe000u ? bits << 19 : 0;
}

template <class T, int COUNT>
__device__ __forceinline__ Pack<T, COUNT> stochastic_pack(const float (&numbers)[COUNT],
                                                          const uint32_t (&words)[COUNT]) {
  Pack<T, COUNT> pack;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const bool away = words[i] < words_away(numbers[i], T{});
    pack.elements[i].bits = static_cast<uint16_t>(bits_towards(numbers[i], T{}) + away);
  }
  return pack;
}

}  // namespace dalle::cuda
