// The lanes of a Vector as 32-bit integers, and choices between lanes by comparison.
#pragma once

#include "common/vector.h"

namespace dalle::DALLE_ISA_NAMESPACE {

#if defined(__AVX512F__)

struct IntegerVector {
  __m512i lanes;
};
DALLE_INLINE IntegerVector as_integer(Vector x) { return {_mm512_castps_si512(x.lanes)}; }
DALLE_INLINE Vector as_float(IntegerVector x) { return {_mm512_castsi512_ps(x.lanes)}; }
DALLE_INLINE IntegerVector broadcast_integer(uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
DALLE_INLINE IntegerVector operator+(IntegerVector a, IntegerVector b) { return {_mm512_add_epi32(a.lanes, b.lanes)}; }
DALLE_INLINE IntegerVector operator-(IntegerVector a, IntegerVector b) { return {_mm512_sub_epi32(a.lanes, b.lanes)}; }
DALLE_INLINE IntegerVector operator&(IntegerVector a, IntegerVector b) { return {_mm512_and_si512(a.lanes, b.lanes)}; }
DALLE_INLINE IntegerVector operator|(IntegerVector a, IntegerVector b) { return {_mm512_or_si512(a.lanes, b.lanes)}; }
DALLE_INLINE IntegerVector operator^(IntegerVector a, IntegerVector b) { return {_mm512_xor_si512(a.lanes, b.lanes)}; }
template <int BITS>
DALLE_INLINE IntegerVector shift_left(IntegerVector x) {
  return {_mm512_slli_epi32(x.lanes, BITS)};
}
template <int BITS>
DALLE_INLINE IntegerVector shift_right(IntegerVector x) {
  return {_mm512_srli_epi32(x.lanes, BITS)};
}
template <int BITS>
DALLE_INLINE IntegerVector shift_right_signed(IntegerVector x) {
  return {_mm512_srai_epi32(x.lanes, BITS)};
}
DALLE_INLINE Vector to_float(IntegerVector x) { return {_mm512_cvtepi32_ps(x.lanes)}; }
DALLE_INLINE Vector select_less(Vector a, Vector b, Vector x, Vector y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.lanes, b.lanes, _CMP_LT_OQ), y.lanes, x.lanes)};
}
DALLE_INLINE Vector select_equal(Vector a, Vector b, Vector x, Vector y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.lanes, b.lanes, _CMP_EQ_OQ), y.lanes, x.lanes)};
}

#elif defined(__AVX2__)

struct IntegerVector {
  __m256i lanes;
};
DALLE_INLINE IntegerVector as_integer(Vector x) { return {_mm256_castps_si256(x.lanes)}; }
DALLE_INLINE Vector as_float(IntegerVector x) { return {_mm256_castsi256_ps(x.lanes)}; }
DALLE_INLINE IntegerVector broadcast_integer(uint32_t x) { return {_mm256_set1_epi32(static_cast<int>(x))}; }
DALLE_INLINE IntegerVector operator+(IntegerVector a, IntegerVector b) { return {_mm256_add_epi32(a.lanes, b.lanes)}; }
DALLE_INLINE IntegerVector operator-(IntegerVector a, IntegerVector b) { return {_mm256_sub_epi32(a.lanes, b.lanes)}; }
DALLE_INLINE IntegerVector operator&(IntegerVector a, IntegerVector b) { return {_mm256_and_si256(a.lanes, b.lanes)}; }
DALLE_INLINE IntegerVector operator|(IntegerVector a, IntegerVector b) { return {_mm256_or_si256(a.lanes, b.lanes)}; }
DALLE_INLINE IntegerVector operator^(IntegerVector a, IntegerVector b) { return {_mm256_xor_si256(a.lanes, b.lanes)}; }
template <int BITS>
DALLE_INLINE IntegerVector shift_left(IntegerVector x) {
  return {_mm256_slli_epi32(x.lanes, BITS)};
}
template <int BITS>
DALLE_INLINE IntegerVector shift_right(IntegerVector x) {
  return {_mm256_srli_epi32(x.lanes, BITS)};
}
template <int BITS>
DALLE_INLINE IntegerVector shift_right_signed(IntegerVector x) {
  return {_mm256_srai_epi32(x.lanes, BITS)};
}
DALLE_INLINE Vector to_float(IntegerVector x) { return {_mm256_cvtepi32_ps(x.lanes)}; }
DALLE_INLINE Vector select_less(Vector a, Vector b, Vector x, Vector y) {
  return {_mm256_blendv_ps(y.lanes, x.lanes, _mm256_cmp_ps(a.lanes, b.lanes, _CMP_LT_OQ))};
}
DALLE_INLINE Vector select_equal(Vector a, Vector b, Vector x, Vector y) {
  return {_mm256_blendv_ps(y.lanes, x.lanes, _mm256_cmp_ps(a.lanes, b.lanes, _CMP_EQ_OQ))};
}

#else

typedef uint32_t UnsignedLanes __attribute__((vector_size(16)));
struct IntegerVector {
  UnsignedLanes lanes;
};
DALLE_INLINE IntegerVector as_integer(Vector x) { return {reinterpret_cast<UnsignedLanes>(x.lanes)}; }
DALLE_INLINE Vector as_float(IntegerVector x) { return {reinterpret_cast<FloatLanes>(x.lanes)}; }
DALLE_INLINE IntegerVector broadcast_integer(uint32_t x) { return {UnsignedLanes{x, x, x, x}}; }
DALLE_INLINE IntegerVector operator+(IntegerVector a, IntegerVector b) { return {a.lanes + b.lanes}; }
DALLE_INLINE IntegerVector operator-(IntegerVector a, IntegerVector b) { return {a.lanes - b.lanes}; }
DALLE_INLINE IntegerVector operator&(IntegerVector a, IntegerVector b) { return {a.lanes & b.lanes}; }
DALLE_INLINE IntegerVector operator|(IntegerVector a, IntegerVector b) { return {a.lanes | b.lanes}; }
DALLE_INLINE IntegerVector operator^(IntegerVector a, IntegerVector b) { return {a.lanes ^ b.lanes}; }
template <int BITS>
DALLE_INLINE IntegerVector shift_left(IntegerVector x) {
  return {x.lanes << BITS};
}
template <int BITS>
DALLE_INLINE IntegerVector shift_right(IntegerVector x) {
  return {x.lanes >> BITS};
}
template <int BITS>
DALLE_INLINE IntegerVector shift_right_signed(IntegerVector x) {
  return {reinterpret_cast<UnsignedLanes>(reinterpret_cast<IntLanes>(x.lanes) >> BITS)};
}
DALLE_INLINE Vector to_float(IntegerVector x) {
  return {__builtin_convertvector(reinterpret_cast<IntLanes>(x.lanes), FloatLanes)};
}
DALLE_INLINE Vector select_less(Vector a, Vector b, Vector x, Vector y) { return blend(a.lanes < b.lanes, x, y); }
DALLE_INLINE Vector select_equal(Vector a, Vector b, Vector x, Vector y) { return blend(a.lanes == b.lanes, x, y); }

#endif

// to_float takes signed integers. select_less(a, b, x, y) is x where a < b, else y, so also where either is NaN;
// select_equal likewise.

}  // namespace dalle::DALLE_ISA_NAMESPACE
