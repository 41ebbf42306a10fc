// Family linear: y = x W^T + b for few rows x, as in the steps of generation.
//
// Floor: the bytes of W over the bandwidth of memory (or of the cache that holds it), or 2 * rows * inputs * outputs
// operations over the arithmetic rate, whichever is longer: memory up to about 4 rows of float32.
// Reached on two Zen 3 threads (AVX2; 28 to 33 GB/s from memory, about 100 from the L3 cache, 175 GFLOP/s), float32:
// 1 row of 8192 x 512 from memory 32 GB/s; from the L3 cache, 1 row 55 to 60 GB/s, 8 rows 95 to 120 GFLOP/s.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace dalle {

// Tensors [rows, columns]: strides in elements between rows; columns lie side by side.
struct Linear {
  Dtype dtype;      // of x, weight and bias: any but float64
  Dtype out_dtype;  // `dtype` or float32
  int64_t rows, inputs, outputs;
  const void* x;  // [rows, inputs]
  int64_t x_stride;
  const void* weight;  // [outputs, inputs]
  int64_t weight_stride;
  const void* bias;  // [outputs], or nullptr
  void* out;         // [rows, outputs], contiguous, written in full
  int threads;
};

DALLE_DECLARE_CPU_KERNEL(linear, Linear)

}  // namespace dalle
