// One number to a code and back, exactly, on host and device: integer arithmetic on the bits of float or double.
#pragma once

#include "common/dtype.h"
#include "float16/float16.h"

namespace dalle {

// A code as it lies in memory, of either format: a type of its own, so that overloads tell it from a number.
template <Float16Format format>
struct Code {
  uint16_t bits;
};
using Fp169 = Code<Float16Format::fp169>;
using Fp0610 = Code<Float16Format::fp0610>;

}  // namespace dalle

namespace dalle::DALLE_ISA_NAMESPACE {

template <class Bits>
struct Ieee;
template <>
struct Ieee<uint32_t> {
  static constexpr int significand = 23, bias = 127;
};
template <>
struct Ieee<uint64_t> {
  static constexpr int significand = 52, bias = 1023;
};

// The constants of a format, for numbers whose bits are of type Bits (float's uint32_t or double's uint64_t).
template <Float16Format format, class Bits>
struct Float16Codec {
  static constexpr int width = 8 * sizeof(Bits);
  static constexpr bool has_sign = format == Float16Format::fp169;
  static constexpr int significand = has_sign ? 9 : 10;
  static constexpr int shift = Ieee<Bits>::significand - significand;
  static constexpr Bits magnitude_mask = ~Bits{0} >> 1;
  static constexpr Bits infinity = Bits{2 * Ieee<Bits>::bias + 1} << Ieee<Bits>::significand;
  static constexpr Bits half_step = Bits{1} << (shift - 1);
  static constexpr Bits rebias = Bits{Ieee<Bits>::bias - 60} << Ieee<Bits>::significand;  // exponent code 0: 2^-60
  static constexpr Bits smallest = rebias + (Bits{1} << shift);                           // code 1
  static constexpr Bits largest = rebias + (Bits{(64 << significand) - 1} << shift);      // all exponent, significand
  static constexpr uint16_t code_mask = static_cast<uint16_t>((64 << significand) - 1);
};

template <class Bits>
DALLE_INLINE bool is_nonfinite(Bits bits) {
  using Codec = Float16Codec<Float16Format::fp169, Bits>;
  return (bits & Codec::magnitude_mask) >= Codec::infinity;
}

// Half away from zero is "add half a step to the magnitude, then truncate". Comparing magnitudes as integers orders
// them as numbers, and puts NaN beyond the largest code, where saturation turns it into the largest positive one, as
// the published encoder does.
template <Float16Format format, class Bits>
DALLE_INLINE uint16_t encode_bits(Bits bits) {
  using Codec = Float16Codec<format, Bits>;
  const Bits magnitude = bits & Codec::magnitude_mask;
  const bool negative = (bits >> (Codec::width - 1)) != 0 && magnitude <= Codec::infinity;
  const Bits saturated = magnitude < Codec::largest ? magnitude : Codec::largest;
  const Bits code = (saturated + Codec::half_step - Codec::rebias) >> Codec::shift;
  const bool flushed = magnitude < Codec::smallest || (negative && !Codec::has_sign);
  const uint16_t sign = negative ? 0x8000u : 0u;
  return flushed ? uint16_t{0} : static_cast<uint16_t>(static_cast<uint16_t>(code) | (Codec::has_sign ? sign : 0));
}

DALLE_INLINE uint32_t encodable_bits(float x) { return bits_of(x); }
DALLE_INLINE uint32_t encodable_bits(Half x) { return bits_of(to_float(x)); }
DALLE_INLINE uint32_t encodable_bits(BFloat16 x) { return bits_of(to_float(x)); }
DALLE_INLINE uint64_t encodable_bits(double x) { return bits_of(x); }

template <Float16Format format>
DALLE_INLINE float decode_code(uint16_t code) {
  using Codec = Float16Codec<format, uint32_t>;
  const uint32_t magnitude = code & Codec::code_mask;
  const uint32_t value = magnitude == 0 ? 0 : (magnitude << Codec::shift) + Codec::rebias;
  const uint32_t sign = Codec::has_sign ? static_cast<uint32_t>(code & 0x8000u) << 16 : 0;
  return float_of(value | sign);
}

}  // namespace dalle::DALLE_ISA_NAMESPACE
