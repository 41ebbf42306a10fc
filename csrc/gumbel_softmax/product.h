// One small matrix product, of which the codebook's three are made.
#pragma once

#include "gumbel_softmax/rows.h"

namespace dalle::DALLE_ISA_NAMESPACE {

constexpr int64_t PANEL = 2 * Vector::width;
// With two registers of columns, as many accumulators as leave room for the operands.
constexpr int PRODUCT_ROWS = Vector::width == 16 ? 12 : 6;
// Terms that an accumulator takes before it is added to the rest, which keeps the rounding of long sums down.
constexpr int64_t PARTIAL_SUM = 64;

// C[i][j] += sum_t A[i][t] B[t][j] for i < rows, t < terms and j < columns, a multiple of PANEL.
struct Product {
  const float* a;
  int64_t a_row, a_term;
  const float* b;
  int64_t b_term;
  float* c;
  int64_t c_row;
};

template <int ROWS>
DALLE_NOINLINE void multiply_panel(const Product& p, int64_t terms) {
  Vector sum[ROWS][2];
  for (int i = 0; i < ROWS; ++i) sum[i][0] = sum[i][1] = broadcast(0.0f);
  for (int64_t t = 0; t < terms; ++t) {
    const float* b = p.b + t * p.b_term;
    const Vector b0 = load(b), b1 = load(b + Vector::width);
    for (int i = 0; i < ROWS; ++i) {
      const Vector a = broadcast(p.a[i * p.a_row + t * p.a_term]);
      sum[i][0] = multiply_add(a, b0, sum[i][0]);
      sum[i][1] = multiply_add(a, b1, sum[i][1]);
    }
  }
  for (int i = 0; i < ROWS; ++i) {
    float* c = p.c + i * p.c_row;
    store(c, load(c) + sum[i][0]);
    store(c + Vector::width, load(c + Vector::width) + sum[i][1]);
  }
}

template <int ROWS>
DALLE_INLINE void multiply_any(int64_t rows, const Product& p, int64_t terms) {
  if (rows == ROWS) return multiply_panel<ROWS>(p, terms);
  if constexpr (ROWS > 1) multiply_any<ROWS - 1>(rows, p, terms);
}

DALLE_NOINLINE inline void multiply(const Product& p, int64_t rows, int64_t terms, int64_t columns) {
  for (int64_t t = 0; t < terms; t += PARTIAL_SUM) {
    const int64_t part = terms - t < PARTIAL_SUM ? terms - t : PARTIAL_SUM;
    for (int64_t j = 0; j < columns; j += PANEL) {
      for (int64_t i = 0; i < rows;) {
        const int64_t left = rows - i, block = left < PRODUCT_ROWS ? left : PRODUCT_ROWS;
        const Product panel{p.a + i * p.a_row + t * p.a_term, p.a_row, p.a_term, p.b + t * p.b_term + j, p.b_term,
                            p.c + i * p.c_row + j,            p.c_row};
        multiply_any<PRODUCT_ROWS>(block, panel, part);
        i += block;
      }
    }
  }
}

}  // namespace dalle::DALLE_ISA_NAMESPACE
