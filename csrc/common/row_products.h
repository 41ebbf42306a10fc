// Products of rows with rows, sum_i x[r][i] w[c][i], where both lie along memory: linear layers and attention scores of
// a few queries. Nothing is packed or transposed, so the larger side is read once, as it lies.
//
// Every product is summed in the same order whatever tile it is in: a row's result does not depend on the rows beside
// it.
#pragma once

#include "common/vector.h"

namespace dalle::DALLE_ISA_NAMESPACE {

// What fits the registers: ROWS x COLUMNS sums and a register for each column. A single row is bound by memory anyway,
// and more than six columns, often a power of two apart, would drive one another out of the cache.
constexpr int TILE_MOST_ROWS = 4;
#if defined(__AVX512F__)
constexpr int TILE_PRODUCTS = 24;
#else
constexpr int TILE_PRODUCTS = 12;
#endif
constexpr int tile_columns(int rows) { return TILE_PRODUCTS / (rows == 1 ? 2 : rows); }

// The sums of the lanes of four vectors.
DALLE_INLINE void store_lane_sums(const Vector* x, float* sums) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  const auto half = [](Vector v) {  // the masks, which choose all, avoid a false warning of some releases of GCC
    return _mm256_add_ps(_mm512_maskz_extractf32x8_ps(0xff, v.lanes, 0),
                         _mm512_maskz_extractf32x8_ps(0xff, v.lanes, 1));
  };
#else
  const auto half = [](Vector v) { return v.lanes; };
#endif
  const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(half(x[0]), half(x[1])), _mm256_hadd_ps(half(x[2]), half(x[3])));
  _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
#else
  for (int i = 0; i < 4; ++i) sums[i] = sum_of_lanes(x[i]);
#endif
}

// products[r * COLUMNS + c] = sum over i < count of x[r * x_stride + i] * w[c][i]. Fetches what lies `ahead` elements
// further in every column.
template <int ROWS, class T>
DALLE_INLINE void row_products(const float* x, int64_t x_stride, const T* const* w, int64_t count, int64_t ahead,
                               float* products) {
  constexpr int COLUMNS = tile_columns(ROWS), PRODUCTS = ROWS * COLUMNS, WIDTH = Vector::width;
  constexpr int PADDED = (PRODUCTS + 3) / 4 * 4;
  Vector sums[PADDED];
#pragma GCC unroll 32
  for (int j = 0; j < PADDED; ++j) sums[j] = broadcast(0.0f);
  int64_t i = 0;
  for (; i + WIDTH <= count; i += WIDTH) {
    Vector factor[COLUMNS];
#pragma GCC unroll 12
    for (int c = 0; c < COLUMNS; ++c) {
      __builtin_prefetch(w[c] + i + ahead);
      factor[c] = load(w[c] + i);
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const Vector row = load(x + r * x_stride + i);
#pragma GCC unroll 12
      for (int c = 0; c < COLUMNS; ++c) sums[r * COLUMNS + c] = multiply_add(row, factor[c], sums[r * COLUMNS + c]);
    }
  }
  if (i < count) {
#pragma GCC unroll 12
    for (int c = 0; c < COLUMNS; ++c) {
      const Vector factor = load_first(w[c] + i, count - i);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        const Vector row = load_first(x + r * x_stride + i, count - i);
        sums[r * COLUMNS + c] = multiply_add(row, factor, sums[r * COLUMNS + c]);
      }
    }
  }
  float stored[PADDED];
#pragma GCC unroll 8
  for (int j = 0; j < PADDED; j += 4) store_lane_sums(sums + j, stored + j);
#pragma GCC unroll 32
  for (int j = 0; j < PRODUCTS; ++j) products[j] = stored[j];
}

}  // namespace dalle::DALLE_ISA_NAMESPACE
