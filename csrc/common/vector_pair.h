// Two vectors at once: 2 * Vector::width consecutive elements as floats, for element-wise work on 16-bit numbers.
//
// A register of 16-bit numbers widens into two registers of 32 bits, and two narrow into one, most cheaply when 128-bit
// lanes stay where they are. So a Pair holds its elements in the order that unpacking leaves them in (AVX2: a has
// elements 0-3 and 8-11, b has 4-7 and 12-15), whatever their type in memory: only element-wise operations and the
// functions of this header may look at it.
#pragma once

#include "common/vector.h"

namespace dalle::DALLE_ISA_NAMESPACE {

struct Pair {
  static constexpr int width = 2 * Vector::width;
  Vector a, b;
};

// A vector register as integers; compilers turn the operators on these into single instructions.
typedef uint32_t Lanes32 __attribute__((vector_size(4 * Vector::width)));
typedef uint16_t Lanes16 __attribute__((vector_size(4 * Vector::width)));
typedef int32_t SignedLanes32 __attribute__((vector_size(4 * Vector::width)));
typedef int16_t SignedLanes16 __attribute__((vector_size(4 * Vector::width)));

// The same register seen as another vector type.
template <class To, class From>
DALLE_INLINE To as(From x) {
  return reinterpret_cast<To>(x);
}

DALLE_INLINE Lanes32 bits_of(Vector x) { return as<Lanes32>(x.lanes); }
DALLE_INLINE Vector vector_of(Lanes32 bits) { return {as<decltype(Vector::lanes)>(bits)}; }
DALLE_INLINE Lanes16 load_lanes(const uint16_t* p) {
  Lanes16 x;
  memcpy(&x, p, sizeof x);
  return x;
}
DALLE_INLINE void store_lanes(uint16_t* p, Lanes16 x) { memcpy(p, &x, sizeof x); }

// unpack_low and unpack_high: 32-bit numbers of the given low and high halves. pack_unsigned and pack_signed: the
// inverse for signed numbers, the first saturating at 0 and 2^16 - 1, the second at -2^15 and 2^15 - 1. paired and
// unpaired: to a Pair's order and back.
#if defined(__AVX512F__)

using Register = __m512i;
DALLE_INLINE Lanes32 unpack_low(Lanes16 low, Lanes16 high) {
  return as<Lanes32>(_mm512_unpacklo_epi16(as<Register>(low), as<Register>(high)));
}
DALLE_INLINE Lanes32 unpack_high(Lanes16 low, Lanes16 high) {
  return as<Lanes32>(_mm512_unpackhi_epi16(as<Register>(low), as<Register>(high)));
}
DALLE_INLINE Lanes16 pack_unsigned(Lanes32 a, Lanes32 b) {
  return as<Lanes16>(_mm512_packus_epi32(as<Register>(a), as<Register>(b)));
}
DALLE_INLINE Lanes16 pack_signed(Lanes32 a, Lanes32 b) {
  return as<Lanes16>(_mm512_packs_epi32(as<Register>(a), as<Register>(b)));
}
DALLE_INLINE Pair paired(Vector first, Vector second) {
  return {{_mm512_shuffle_f32x4(first.lanes, second.lanes, 0x88)},
          {_mm512_shuffle_f32x4(first.lanes, second.lanes, 0xdd)}};
}
DALLE_INLINE void unpaired(Pair x, Vector& first, Vector& second) {
  const __m512 low = _mm512_shuffle_f32x4(x.a.lanes, x.b.lanes, 0x44);
  const __m512 high = _mm512_shuffle_f32x4(x.a.lanes, x.b.lanes, 0xee);
  first = {_mm512_shuffle_f32x4(low, low, 0xd8)};
  second = {_mm512_shuffle_f32x4(high, high, 0xd8)};
}

#elif defined(__AVX2__)

using Register = __m256i;
DALLE_INLINE Lanes32 unpack_low(Lanes16 low, Lanes16 high) {
  return as<Lanes32>(_mm256_unpacklo_epi16(as<Register>(low), as<Register>(high)));
}
DALLE_INLINE Lanes32 unpack_high(Lanes16 low, Lanes16 high) {
  return as<Lanes32>(_mm256_unpackhi_epi16(as<Register>(low), as<Register>(high)));
}
DALLE_INLINE Lanes16 pack_unsigned(Lanes32 a, Lanes32 b) {
  return as<Lanes16>(_mm256_packus_epi32(as<Register>(a), as<Register>(b)));
}
DALLE_INLINE Lanes16 pack_signed(Lanes32 a, Lanes32 b) {
  return as<Lanes16>(_mm256_packs_epi32(as<Register>(a), as<Register>(b)));
}
DALLE_INLINE Pair paired(Vector first, Vector second) {
  return {{_mm256_permute2f128_ps(first.lanes, second.lanes, 0x20)},
          {_mm256_permute2f128_ps(first.lanes, second.lanes, 0x31)}};
}
DALLE_INLINE void unpaired(Pair x, Vector& first, Vector& second) {
  first = {_mm256_permute2f128_ps(x.a.lanes, x.b.lanes, 0x20)};
  second = {_mm256_permute2f128_ps(x.a.lanes, x.b.lanes, 0x31)};
}

#else

DALLE_INLINE Lanes32 unpack_low(Lanes16 low, Lanes16 high) {
  return as<Lanes32>(Lanes16{low[0], high[0], low[1], high[1], low[2], high[2], low[3], high[3]});
}
DALLE_INLINE Lanes32 unpack_high(Lanes16 low, Lanes16 high) {
  return as<Lanes32>(Lanes16{low[4], high[4], low[5], high[5], low[6], high[6], low[7], high[7]});
}
DALLE_INLINE Lanes16 low_halves(Lanes32 a, Lanes32 b) {
  const Lanes16 x = as<Lanes16>(a), y = as<Lanes16>(b);
  return Lanes16{x[0], x[2], x[4], x[6], y[0], y[2], y[4], y[6]};
}
DALLE_INLINE Lanes32 clamped(Lanes32 x, int32_t least, int32_t most) {
  const SignedLanes32 y = as<SignedLanes32>(x), z = y < least ? SignedLanes32{} + least : y;
  return as<Lanes32>(z > most ? SignedLanes32{} + most : z);
}
DALLE_INLINE Lanes16 pack_unsigned(Lanes32 a, Lanes32 b) {
  return low_halves(clamped(a, 0, 0xffff), clamped(b, 0, 0xffff));
}
DALLE_INLINE Lanes16 pack_signed(Lanes32 a, Lanes32 b) {
  return low_halves(clamped(a, -0x8000, 0x7fff), clamped(b, -0x8000, 0x7fff));
}
DALLE_INLINE Pair paired(Vector first, Vector second) { return {first, second}; }
DALLE_INLINE void unpaired(Pair x, Vector& first, Vector& second) {
  first = x.a;
  second = x.b;
}

#endif

template <class T>
DALLE_INLINE Pair load_pair(const T* p) {
  return paired(load(p), load(p + Vector::width));
}
DALLE_INLINE Pair load_pair(const BFloat16* p) {
  const Lanes16 zero = {}, x = load_lanes(&p->bits);
  return {vector_of(unpack_low(zero, x)), vector_of(unpack_high(zero, x))};
}

template <class T>
DALLE_INLINE void store_pair(T* p, Pair x) {
  Vector first, second;
  unpaired(x, first, second);
  store(p, first);
  store(p + Vector::width, second);
}

// Round to nearest, ties to even; NaN stays NaN. Comparing for the bit that decides a tie is cheaper than shifting it.
DALLE_INLINE Lanes32 to_bfloat16(Vector x) {
  const Lanes32 bits = bits_of(x), minus_one_where_even = as<Lanes32>((bits & 0x10000u) == 0);
  return ((bits + 0x8000u + minus_one_where_even) | as<Lanes32>(x.lanes != x.lanes)) >> 16;
}
DALLE_INLINE void store_pair(BFloat16* p, Pair x) {
  store_lanes(&p->bits, pack_unsigned(to_bfloat16(x.a), to_bfloat16(x.b)));
}

template <class Function>
DALLE_INLINE Pair map(Pair x, const Function& function) {
  return {function(x.a), function(x.b)};
}

// Tells whether any number it has seen was an infinity or NaN: 0 times such a one is NaN, and stays so.
struct NonfiniteWatch {
  Vector a = broadcast(0.0f), b = broadcast(0.0f);
  void see(Pair x) {
    a = multiply_add(x.a, broadcast(0.0f), a);
    b = multiply_add(x.b, broadcast(0.0f), b);
  }
  bool seen() const { return sum_of_lanes(a + b) != 0.0f; }
};

}  // namespace dalle::DALLE_ISA_NAMESPACE
