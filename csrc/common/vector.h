// Vector maths: one thin type, `Vector`, over the registers of the instruction set that is being compiled for.
//
// AVX-512 has 16 lanes of float, AVX2 8, the portable build 4 (compiler vectors, which become SSE2 or NEON). The type
// has the few operations that kernels need, no more; a new instruction set is added by writing these once again.
#pragma once

#include "common/dtype.h"
#include "common/intrinsics.h"

namespace dalle::DALLE_ISA_NAMESPACE {

#if defined(__AVX512F__)

struct Vector {
  static constexpr int width = 16;
  __m512 lanes;
};
DALLE_INLINE Vector load(const float* p) { return {_mm512_loadu_ps(p)}; }
DALLE_INLINE Vector load(const BFloat16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
DALLE_INLINE Vector load(const Half* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
DALLE_INLINE void store(float* p, Vector x) { _mm512_storeu_ps(p, x.lanes); }
DALLE_INLINE void store(Half* p, Vector x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x.lanes, _MM_FROUND_TO_NEAREST_INT));
}
DALLE_INLINE Vector broadcast(float x) { return {_mm512_set1_ps(x)}; }
DALLE_INLINE Vector operator+(Vector a, Vector b) { return {_mm512_add_ps(a.lanes, b.lanes)}; }
DALLE_INLINE Vector operator-(Vector a, Vector b) { return {_mm512_sub_ps(a.lanes, b.lanes)}; }
DALLE_INLINE Vector operator*(Vector a, Vector b) { return {_mm512_mul_ps(a.lanes, b.lanes)}; }
DALLE_INLINE Vector operator/(Vector a, Vector b) { return {_mm512_div_ps(a.lanes, b.lanes)}; }
DALLE_INLINE Vector multiply_add(Vector a, Vector b, Vector c) { return {_mm512_fmadd_ps(a.lanes, b.lanes, c.lanes)}; }
DALLE_INLINE Vector maximum(Vector a, Vector b) { return {_mm512_max_ps(a.lanes, b.lanes)}; }
DALLE_INLINE Vector minimum(Vector a, Vector b) { return {_mm512_min_ps(a.lanes, b.lanes)}; }
DALLE_INLINE Vector square_root(Vector x) { return {_mm512_sqrt_ps(x.lanes)}; }
DALLE_INLINE Vector select(uint32_t bits, Vector a, Vector b) {
  return {_mm512_mask_blend_ps(static_cast<__mmask16>(bits), b.lanes, a.lanes)};
}
DALLE_INLINE Vector round_to_integer(Vector x) {
  return {_mm512_roundscale_ps(x.lanes, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
DALLE_INLINE Vector times_power_of_two(Vector x, Vector n) { return {_mm512_scalef_ps(x.lanes, n.lanes)}; }
DALLE_INLINE Vector zero_where_less(Vector x, Vector a, Vector b) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.lanes, b.lanes, _CMP_NLT_UQ), x.lanes)};
}
DALLE_INLINE bool any_less(Vector a, Vector b) { return _mm512_cmp_ps_mask(a.lanes, b.lanes, _CMP_LT_OQ) != 0; }

#elif defined(__AVX2__)

struct Vector {
  static constexpr int width = 8;
  __m256 lanes;
};
DALLE_INLINE Vector load(const float* p) { return {_mm256_loadu_ps(p)}; }
DALLE_INLINE Vector load(const BFloat16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
}
DALLE_INLINE Vector load(const Half* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
DALLE_INLINE void store(float* p, Vector x) { _mm256_storeu_ps(p, x.lanes); }
DALLE_INLINE void store(Half* p, Vector x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.lanes, _MM_FROUND_TO_NEAREST_INT));
}
DALLE_INLINE Vector broadcast(float x) { return {_mm256_set1_ps(x)}; }
DALLE_INLINE Vector operator+(Vector a, Vector b) { return {_mm256_add_ps(a.lanes, b.lanes)}; }
DALLE_INLINE Vector operator-(Vector a, Vector b) { return {_mm256_sub_ps(a.lanes, b.lanes)}; }
DALLE_INLINE Vector operator*(Vector a, Vector b) { return {_mm256_mul_ps(a.lanes, b.lanes)}; }
DALLE_INLINE Vector operator/(Vector a, Vector b) { return {_mm256_div_ps(a.lanes, b.lanes)}; }
DALLE_INLINE Vector multiply_add(Vector a, Vector b, Vector c) { return {_mm256_fmadd_ps(a.lanes, b.lanes, c.lanes)}; }
DALLE_INLINE Vector maximum(Vector a, Vector b) { return {_mm256_max_ps(a.lanes, b.lanes)}; }
DALLE_INLINE Vector minimum(Vector a, Vector b) { return {_mm256_min_ps(a.lanes, b.lanes)}; }
DALLE_INLINE Vector square_root(Vector x) { return {_mm256_sqrt_ps(x.lanes)}; }
DALLE_INLINE Vector select(uint32_t bits, Vector a, Vector b) {
  const __m256i lane_bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i chosen = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane_bit);
  return {_mm256_blendv_ps(b.lanes, a.lanes, _mm256_castsi256_ps(_mm256_cmpeq_epi32(chosen, lane_bit)))};
}
DALLE_INLINE Vector round_to_integer(Vector x) {
  return {_mm256_round_ps(x.lanes, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
DALLE_INLINE Vector times_power_of_two(Vector x, Vector n) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.lanes), _mm256_set1_epi32(127)), 23);
  return {_mm256_mul_ps(x.lanes, _mm256_castsi256_ps(exponent))};
}
DALLE_INLINE Vector zero_where_less(Vector x, Vector a, Vector b) {
  return {_mm256_and_ps(_mm256_cmp_ps(a.lanes, b.lanes, _CMP_NLT_UQ), x.lanes)};
}
DALLE_INLINE bool any_less(Vector a, Vector b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a.lanes, b.lanes, _CMP_LT_OQ)) != 0;
}

#else

typedef float FloatLanes __attribute__((vector_size(16)));
typedef int32_t IntLanes __attribute__((vector_size(16)));
struct Vector {
  static constexpr int width = 4;
  FloatLanes lanes;
};
DALLE_INLINE Vector load(const float* p) {
  Vector x;
  memcpy(&x.lanes, p, sizeof x.lanes);
  return x;
}
DALLE_INLINE Vector load(const BFloat16* p) {
  return {FloatLanes{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
}
DALLE_INLINE Vector load(const Half* p) {
  return {FloatLanes{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
}
DALLE_INLINE void store(float* p, Vector x) { memcpy(p, &x.lanes, sizeof x.lanes); }
DALLE_INLINE void store(Half* p, Vector x) {
  for (int i = 0; i < Vector::width; ++i) from_float(x.lanes[i], p[i]);
}
DALLE_INLINE Vector broadcast(float x) { return {FloatLanes{x, x, x, x}}; }
DALLE_INLINE Vector operator+(Vector a, Vector b) { return {a.lanes + b.lanes}; }
DALLE_INLINE Vector operator-(Vector a, Vector b) { return {a.lanes - b.lanes}; }
DALLE_INLINE Vector operator*(Vector a, Vector b) { return {a.lanes * b.lanes}; }
DALLE_INLINE Vector operator/(Vector a, Vector b) { return {a.lanes / b.lanes}; }
DALLE_INLINE Vector multiply_add(Vector a, Vector b, Vector c) { return {a.lanes * b.lanes + c.lanes}; }
DALLE_INLINE Vector blend(IntLanes chosen, Vector a, Vector b) {
  return {reinterpret_cast<FloatLanes>((chosen & reinterpret_cast<IntLanes>(a.lanes)) |
                                       (~chosen & reinterpret_cast<IntLanes>(b.lanes)))};
}
DALLE_INLINE Vector maximum(Vector a, Vector b) { return blend(a.lanes > b.lanes, a, b); }
DALLE_INLINE Vector minimum(Vector a, Vector b) { return blend(a.lanes < b.lanes, a, b); }
DALLE_INLINE Vector square_root(Vector x) {
  for (int i = 0; i < Vector::width; ++i) x.lanes[i] = __builtin_sqrtf(x.lanes[i]);
  return x;
}
DALLE_INLINE Vector select(uint32_t bits, Vector a, Vector b) {
  constexpr IntLanes lane_bit = {1, 2, 4, 8};
  return blend((lane_bit & static_cast<int32_t>(bits)) == lane_bit, a, b);
}
DALLE_INLINE Vector round_to_integer(Vector x) {
  const Vector shift = broadcast(12582912.0f);  // 1.5 * 2^23: what is left below it are whole numbers
  return (x + shift) - shift;
}
DALLE_INLINE Vector times_power_of_two(Vector x, Vector n) {
  const IntLanes exponent = (__builtin_convertvector(n.lanes, IntLanes) + 127) << 23;
  return {x.lanes * reinterpret_cast<FloatLanes>(exponent)};
}
DALLE_INLINE Vector zero_where_less(Vector x, Vector a, Vector b) {
  return blend(a.lanes < b.lanes, broadcast(0.0f), x);
}
DALLE_INLINE bool any_less(Vector a, Vector b) {
  const IntLanes less = a.lanes < b.lanes;
  return (less[0] | less[1] | less[2] | less[3]) != 0;
}

#endif

// maximum(a, b) and minimum(a, b) are b where either is NaN; select takes lane i of a where bit i is set, else of b;
// times_power_of_two wants a whole n in [-126, 127]; zero_where_less(x, a, b) is 0 where a < b, else x, also where a is
// NaN; any_less(a, b) is whether a < b in any lane.

// Round to nearest, ties to even; NaN stays NaN.
DALLE_INLINE void store(BFloat16* p, Vector x) {
#if defined(__AVX512F__)
  const __m512i bits = _mm512_castps_si512(x.lanes), one = _mm512_set1_epi32(1);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
  __m512i high = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff)), 16);
  high = _mm512_mask_mov_epi32(high, _mm512_cmp_ps_mask(x.lanes, x.lanes, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(high));
#elif defined(__AVX2__)
  const __m256i bits = _mm256_castps_si256(x.lanes), one = _mm256_set1_epi32(1);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
  __m256i high = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff)), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.lanes, x.lanes, _CMP_UNORD_Q));
  high = _mm256_blendv_epi8(high, _mm256_set1_epi32(0x7fc0), nan);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
#else
  float values[Vector::width];
  store(values, x);
  for (int i = 0; i < Vector::width; ++i) from_float(values[i], p[i]);
#endif
}

// The first `count` lanes, the others 0, touching no memory beyond them.
template <class T>
DALLE_INLINE Vector load_first(const T* p, int64_t count) {
  if (count >= Vector::width) return load(p);
  T values[Vector::width] = {};
  for (int64_t i = 0; i < count; ++i) values[i] = p[i];
  return load(values);
}

template <class T>
DALLE_INLINE void store_first(T* p, int64_t count, Vector x) {
  if (count >= Vector::width) return store(p, x);
  T values[Vector::width];
  store(values, x);
  for (int64_t i = 0; i < count; ++i) p[i] = values[i];
}

DALLE_INLINE float largest_lane(Vector x) {
  float values[Vector::width];
  store(values, x);
  float largest = values[0];
  for (int i = 1; i < Vector::width; ++i) largest = values[i] > largest ? values[i] : largest;
  return largest;
}

DALLE_INLINE float sum_of_lanes(Vector x) {
  float values[Vector::width];
  store(values, x);
  // Pairwise, so that the order (and the rounding) is the same whatever the compiler makes of it.
  for (int step = Vector::width / 2; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) values[i] += values[i + step];
  }
  return values[0];
}

// a * b + c, where c takes most of the product away: without the product's rounding.
#if defined(__AVX2__)
DALLE_INLINE Vector reduced_product(Vector a, Vector b, Vector c) { return multiply_add(a, b, c); }
#else
// The 12 leading bits of a float; the product of two such is exact.
DALLE_INLINE Vector leading(Vector x) {
  return {reinterpret_cast<FloatLanes>(reinterpret_cast<IntLanes>(x.lanes) & ~0xfff)};
}
DALLE_INLINE Vector reduced_product(Vector a, Vector b, Vector c) {
  const Vector a_leading = leading(a), b_leading = leading(b);
  return (a_leading * b_leading + c) + (a_leading * (b - b_leading) + (a - a_leading) * b);
}
#endif

// A factor as the sum of two floats, for products that must not lose its last bits.
struct Factor {
  Vector high, low;
  explicit Factor(double x)
      : high(broadcast(static_cast<float>(x))), low(broadcast(static_cast<float>(x - static_cast<float>(x)))) {}
};

// 2^(x * factor) for products up to 127, relative error about 1e-7 however large the product; 0 below 2^-126 (also for
// an infinite x), NaN for NaN. 2^f on [-1/2, 1/2] is a minimax polynomial of degree 6, of relative error 2e-9 before
// rounding.
DALLE_INLINE Vector exp2_of_product(Vector x, const Factor& factor) {
  const Vector smallest = broadcast(-126.0f);
  const Vector product = x * factor.high;
  const Vector whole = round_to_integer(maximum(smallest, product));
  const Vector f = multiply_add(x, factor.low, reduced_product(x, factor.high, broadcast(0.0f) - whole));
  Vector y = broadcast(1.5353362e-4f);
  y = multiply_add(y, f, broadcast(1.3398875e-3f));
  y = multiply_add(y, f, broadcast(9.61843692e-3f));
  y = multiply_add(y, f, broadcast(5.55033237e-2f));
  y = multiply_add(y, f, broadcast(0.240226477f));
  y = multiply_add(y, f, broadcast(0.693147182f));
  y = multiply_add(y, f, broadcast(1.0f));
  return zero_where_less(times_power_of_two(y, whole), product, smallest);
}

// to[j][i] = from[i][j] for an 8 x 8 block of rows `from_stride` and `to_stride` floats apart. Rows of `to` are written
// in their order and may overlap one another, but not `from`.
DALLE_INLINE void transpose_8x8(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
#if defined(__AVX2__)
  __m256 a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(from + i * from_stride);
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) _mm256_storeu_ps(to + i * to_stride, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
  for (int i = 0; i < 4; ++i) _mm256_storeu_ps(to + (i + 4) * to_stride, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
#else
  for (int j = 0; j < 8; ++j) {
    for (int i = 0; i < 8; ++i) to[j * to_stride + i] = from[i * from_stride + j];
  }
#endif
}

}  // namespace dalle::DALLE_ISA_NAMESPACE
