// The codec of codec.h on the packs of a CUDA kernel: the same codes in fewer instructions.
#pragma once

#include "common/pack.h"
#include "float16/codec.h"

// In the namespace of Code, where the templates of pack.h find them.
namespace dalle {

template <Float16Format format>
__device__ __forceinline__ float number_of(Code<format> code) {
  return plain::decode_code<format>(code.bits);
}

// The comparisons of encode_bits are those of minima, which take NaN for the largest number as well.
template <Float16Format format>
__device__ __forceinline__ uint32_t encoded(float x) {
  using Codec = plain::Float16Codec<format, uint32_t>;
  const float largest = __uint_as_float(Codec::largest), most = fminf(x, largest);
  const uint32_t magnitude =
      __float_as_uint(Codec::has_sign ? fminf(fabsf(most), largest) : fmaxf(most, 0.0f));
  uint32_t code = (magnitude + (Codec::half_step - Codec::rebias)) >> Codec::shift;
  if (Codec::has_sign) code |= (__float_as_uint(most) >> 16) & 0x8000u;
  return magnitude < Codec::smallest ? 0 : code;
}

template <Float16Format format>
__device__ __forceinline__ uint32_t rounded_pair(float first, float second, Code<format>) {
  return encoded<format>(first) | encoded<format>(second) << 16;
}

}  // namespace dalle
