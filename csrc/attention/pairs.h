// Operands of dot products of bfloat16: two numbers in an element, which one instruction multiplies with two others and
// adds up in float32. Only the forward takes them, and only of bfloat16 in a build that has the instruction.
#pragma once

#include "attention/pack.h"
#include "common/vector_integer.h"

namespace dalle::DALLE_ISA_NAMESPACE {

// The element that tensors of type T are packed as.
template <class T>
struct PackedAs {
  using Element = float;
};

// Rows of a matrix as blocked rows of elements whose numbers lie side by side in a row.
template <class T>
DALLE_INLINE void pack_along_rows(const Matrix<const T>& from, const int32_t* tokens, int64_t count, float sign,
                                  const Columns& columns, float* to, int64_t to_rows) {
  pack_rows(from, tokens, count, sign, columns, to, to_rows);
}

// The same, of elements whose numbers come from neighbouring rows; `to_rows` rows of elements a block.
template <class T>
DALLE_INLINE void pack_across_rows(const Matrix<const T>& from, const int32_t* tokens, int64_t count, float sign,
                                   const Columns& columns, float* to, int64_t to_rows) {
  pack_rows(from, tokens, count, sign, columns, to, to_rows);
}

// Probabilities [key][PANEL], `end` floats, as elements whose numbers come from neighbouring keys, in their place.
DALLE_INLINE void join_keys(float*, int64_t) {}

#if defined(__AVX512BF16__)

struct BFloat16Pair {
  BFloat16 first, second;
};
template <>
struct PackedAs<BFloat16> {
  using Element = BFloat16Pair;
};
template <>
constexpr int64_t NUMBERS_IN<BFloat16Pair> = 2;

struct PairVector {
  __m512i lanes;
};
DALLE_INLINE PairVector load(const BFloat16Pair* p) { return {_mm512_loadu_si512(p)}; }
DALLE_INLINE void store(BFloat16Pair* p, PairVector x) { _mm512_storeu_si512(p, x.lanes); }
DALLE_INLINE PairVector broadcast(BFloat16Pair x) {
  int bits;
  memcpy(&bits, &x, sizeof bits);
  return {_mm512_set1_epi32(bits)};
}
DALLE_INLINE Vector multiply_add(PairVector a, PairVector b, Vector c) {
  __m512bh left, right;
  memcpy(&left, &a, sizeof left);
  memcpy(&right, &b, sizeof right);
  return {_mm512_dpbf16_ps(c.lanes, left, right)};
}
// The lanes of `first`, rounded to nearest, and then those of `second`.
DALLE_INLINE __m512i rounded(Vector first, Vector second) {
  const __m512bh both = _mm512_cvtne2ps_pbh(second.lanes, first.lanes);
  __m512i bits;
  memcpy(&bits, &both, sizeof bits);
  return bits;
}
// Rows `first` and `second` of 16 numbers each, element i from number i of both.
DALLE_INLINE PairVector interleave(__m256i first, __m256i second) {
  return {_mm512_or_si512(_mm512_cvtepu16_epi32(first), _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16))};
}

// 16 numbers of a row from column d on, 0 beyond its end and for a row that is not there.
DALLE_INLINE __m256i load_sixteen(const BFloat16* row, int64_t d, int64_t head_dim) {
  if (row == nullptr || d >= head_dim) return _mm256_setzero_si256();
  if (d + 16 <= head_dim) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + d));
  BFloat16 numbers[16] = {};
  for (int64_t i = d; i < head_dim; ++i) numbers[i - d] = row[i];
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(numbers));
}
// Times 1, 0 or -1.
DALLE_INLINE __m512i signed_bits(__m512i numbers, float sign) {
  if (sign == 0) return _mm512_set1_epi32(0);
  return sign > 0 ? numbers : _mm512_xor_si512(numbers, _mm512_set1_epi32(static_cast<int>(0x80008000u)));
}
DALLE_INLINE const BFloat16* row_of(const Matrix<const BFloat16>& from, int32_t token) {
  return token < 0 ? nullptr : from.data + token * from.stride;
}

DALLE_NOINLINE inline void pack_along_rows(const Matrix<const BFloat16>& from, const int32_t* tokens, int64_t count,
                                           float sign, const Columns& columns, BFloat16Pair* to, int64_t to_rows) {
  const int64_t steps = (columns.head_dim + 1) / 2;
  for (int64_t i = 0; i < count; ++i) {
    const BFloat16* row = row_of(from, tokens[i]);
    if (i + ROWS_AHEAD < count) fetch_row(from, tokens[i + ROWS_AHEAD], columns.head_dim);
    for (int64_t step = 0; step < (steps + PANEL - 1) / PANEL * PANEL; step += 16) {
      const __m256i low = load_sixteen(row, 2 * step, columns.head_dim);
      const __m256i high = load_sixteen(row, 2 * step + 16, columns.head_dim);
      const __m256i halves[2] = {low, high};
      __m512i numbers;
      memcpy(&numbers, halves, sizeof numbers);
      store(to + (step / PANEL * to_rows + i) * PANEL + step % PANEL, PairVector{signed_bits(numbers, sign)});
    }
  }
}

DALLE_NOINLINE inline void pack_across_rows(const Matrix<const BFloat16>& from, const int32_t* tokens, int64_t count,
                                            float sign, const Columns& columns, BFloat16Pair* to, int64_t to_rows) {
  for (int64_t i = 0; i < count; i += 2) {
    const BFloat16 *first = row_of(from, tokens[i]), *second = row_of(from, tokens[i + 1]);
    for (int64_t d = 0; d < columns.width; d += 16) {
      const PairVector x = interleave(load_sixteen(first, d, columns.head_dim),
                                      load_sixteen(second, d, columns.head_dim));
      store(to + (d / PANEL * to_rows + i / 2) * PANEL + d % PANEL, PairVector{signed_bits(x.lanes, sign)});
    }
  }
}

DALLE_NOINLINE inline void transpose_panel(const BFloat16Pair* from, int64_t blocks, BFloat16Pair* to) {
  transpose_panel(reinterpret_cast<const float*>(from), blocks, reinterpret_cast<float*>(to));
}

DALLE_INLINE void join_keys(BFloat16Pair* numbers, int64_t end) {
  const float* from = reinterpret_cast<const float*>(numbers);
  for (int64_t i = 0; i < end; i += 2 * PANEL) {
    for (int64_t lane = 0; lane < PANEL; lane += 16) {
      const __m512i bits = rounded(load(from + i + lane), load(from + i + PANEL + lane));
      __m256i halves[2];
      memcpy(halves, &bits, sizeof bits);
      store(numbers + i / 2 + lane, interleave(halves[0], halves[1]));
    }
  }
}

#endif

}  // namespace dalle::DALLE_ISA_NAMESPACE
