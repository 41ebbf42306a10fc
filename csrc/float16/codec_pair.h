// The codec of codec.h on a Pair of vectors (common/vector_pair.h): the same bits, many numbers at once.
#pragma once

#include "common/vector_pair.h"
#include "float16/codec.h"

namespace dalle::DALLE_ISA_NAMESPACE {

// A code as it lies in memory, of either format: a type of its own, so that overloads tell it from a number.
template <Float16Format format>
struct Code {
  uint16_t bits;
};
using Fp169 = Code<Float16Format::fp169>;
using Fp0610 = Code<Float16Format::fp0610>;

// The upper half of a float holds sign, exponent and the first 7 bits of the significand, the lower half the rest of
// it: both are computed on 16-bit lanes, two codes to a lane of float.
template <Float16Format format>
DALLE_INLINE Pair load_pair(const Code<format>* p) {
  using Codec = Float16Codec<format, uint32_t>;
  constexpr int rest = Codec::significand - 7;  // bits of a code's significand that go to the lower half
  constexpr uint16_t rebias = Codec::rebias >> 16;
  const Lanes16 codes = load_lanes(&p->bits);
  const Lanes16 magnitude = codes & Codec::code_mask;
  const Lanes16 sign = Codec::has_sign ? codes & 0x8000 : Lanes16{};
  const Lanes16 is_zero = as<Lanes16>(magnitude == 0);
  const Lanes16 high = ((magnitude >> rest) + (~is_zero & rebias)) | sign;
  const Lanes16 low = codes << (16 - rest);
  return {vector_of(unpack_low(low, high)), vector_of(unpack_high(low, high))};
}

template <Float16Format format>
DALLE_INLINE Lanes32 encode_lanes(Vector x) {
  using Codec = Float16Codec<format, uint32_t>;
  const float largest = float_of(Codec::largest), lowest = Codec::has_sign ? -largest : 0.0f;
  const Lanes32 bits = bits_of(maximum(minimum(x, broadcast(largest)), broadcast(lowest)));  // NaN: the largest
  const Lanes32 magnitude = bits & 0x7fffffffu;
  const Lanes32 code = (magnitude + (Codec::half_step - Codec::rebias)) >> Codec::shift;
  const Lanes32 sign = Codec::has_sign ? (bits >> 16) & 0x8000u : Lanes32{};
  const auto kept = as<SignedLanes32>(magnitude) > static_cast<int32_t>(Codec::smallest - 1);
  return as<Lanes32>(kept) & (code | sign);
}

template <Float16Format format>
DALLE_INLINE void store_pair(Code<format>* p, Pair x) {
  store_lanes(&p->bits, pack(encode_lanes<format>(x.a), encode_lanes<format>(x.b)));
}

}  // namespace dalle::DALLE_ISA_NAMESPACE
