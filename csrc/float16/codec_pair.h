// The codec of codec.h on a Pair of vectors (common/vector_pair.h): the same bits, many numbers at once.
#pragma once

#include "common/vector_pair.h"
#include "float16/codec.h"

namespace dalle::DALLE_ISA_NAMESPACE {

// The upper half of a float holds sign, exponent and the first 7 bits of the significand, the lower half the rest of
// it: both are computed on 16-bit lanes, two codes to a lane of float.
template <Float16Format format>
DALLE_INLINE Pair load_pair(const Code<format>* p) {
  using Codec = Float16Codec<format, uint32_t>;
  constexpr int rest = Codec::significand - 7;  // bits of a code's significand that go to the lower half
  constexpr uint16_t rebias = Codec::rebias >> 16;
  const Lanes16 codes = load_lanes(&p->bits);
  const Lanes16 is_zero = as<Lanes16>((codes & Codec::code_mask) == 0);
  const Lanes16 shifted = Codec::has_sign ? as<Lanes16>(as<SignedLanes16>(codes) >> rest) & 0x9fff : codes >> rest;
  const Lanes16 high = shifted + (~is_zero & rebias), low = codes << (16 - rest);
  return {vector_of(unpack_low(low, high)), vector_of(unpack_high(low, high))};
}

// Codes of numbers given as the bits of their magnitudes; beyond the largest code where they are.
template <Float16Format format>
DALLE_INLINE Lanes32 encode_magnitudes(Lanes32 magnitudes) {
  using Codec = Float16Codec<format, uint32_t>;
  const auto kept = as<SignedLanes32>(magnitudes) > static_cast<int32_t>(Codec::smallest - 1);
  return as<Lanes32>(kept) & ((magnitudes + (Codec::half_step - Codec::rebias)) >> Codec::shift);
}

DALLE_INLINE void store_pair(Fp169* p, Pair x) {
  const Vector largest = broadcast(float_of(Float16Codec<Float16Format::fp169, uint32_t>::largest));
  const Lanes32 a = bits_of(minimum(x.a, largest)), b = bits_of(minimum(x.b, largest));  // NaN becomes the largest
  const Lanes16 magnitudes = pack_signed(encode_magnitudes<Float16Format::fp169>(a & 0x7fffffffu),
                                         encode_magnitudes<Float16Format::fp169>(b & 0x7fffffffu));
  const Lanes16 nonzero = as<Lanes16>(as<SignedLanes16>(magnitudes) > 0);
  // Saturation keeps the signs; zero has none.
  store_lanes(&p->bits, magnitudes | (pack_signed(a, b) & nonzero & 0x8000));
}

// For numbers from 0 on, and no NaN.
DALLE_INLINE void store_nonnegative_pair(Fp0610* p, Pair x) {
  store_lanes(&p->bits, pack_unsigned(encode_magnitudes<Float16Format::fp0610>(bits_of(x.a)),
                                      encode_magnitudes<Float16Format::fp0610>(bits_of(x.b))));
}
DALLE_INLINE void store_nonnegative_pair(float* p, Pair x) { store_pair(p, x); }

DALLE_INLINE void store_pair(Fp0610* p, Pair x) {
  const Vector largest = broadcast(float_of(Float16Codec<Float16Format::fp0610, uint32_t>::largest));
  const Vector zero = broadcast(0.0f);
  store_nonnegative_pair(p, {maximum(minimum(x.a, largest), zero), maximum(minimum(x.b, largest), zero)});
}

}  // namespace dalle::DALLE_ISA_NAMESPACE
