// The matrix product of family linear, for many rows: C = A B, C += A B, or A B plus a bias for each column.
//
// Floor: 2 * rows * columns * depth operations at the rate of multiply-adds, once the shorter sides are some hundred
// long: two Zen 3 threads (AVX2: two multiply-adds of 8 lanes a cycle each) at 2.9 GHz have 186 GFLOP/s. Below that,
// memory: B is read and written once packed, A once for every 4096 columns, C once for every 256 of the depth.
// Reached there: 150 to 168 GFLOP/s in the shapes of a model of width 256 or 512 and its losses, where MKL's has 140 to
// 165; 86 to 125 where neighbours on the host leave that 80 to 95.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace dalle {

// A matrix of any strides, in elements.
struct ProductOperand {
  const void* data;
  Dtype dtype;  // any but float64
  int64_t row_stride, column_stride;
};

// Sums are taken in float32, in an order that neither the number of threads nor the other rows and columns change.
struct Product {
  int64_t rows, columns, depth;  // a depth of 0 makes zeros, or adds none
  ProductOperand a;              // [rows, depth]
  ProductOperand b;              // [depth, columns]
  const float* bias;             // [columns], or nullptr
  void* out;                     // [rows, columns], columns side by side, written in full
  Dtype out_dtype;               // any but float64
  int64_t out_stride;            // between rows
  bool accumulate;               // adds to what `out` holds, which is float32 then
  int threads;
};

DALLE_DECLARE_CPU_KERNEL(product, Product)

}  // namespace dalle
