// Family cross_entropy: what lies between the matrix products of a linear layer with cross-entropy (arXiv 2102.12092,
// B.1), for one chunk of rows at a time. dalle_kernels/cross_entropy/native.py is the loop over chunks.
//
// The logits of a chunk come transposed, [classes, rows]: every lane of a register belongs to a row of its own, and
// memory is read from front to back.
//
// Floor of the whole, forward and backward: 6 * rows * classes * width operations in three matrix products. Rows of 512
// against 16384 classes (1024 rows) and 8192 classes (4096 rows): 155 GFLOP, 754 ms at the 205 GFLOP/s that two Zen 3
// cores at 3.2 GHz have in float32, 831 ms at the 186 of 2.9 GHz. Floor of what is between them: each logit is read
// twice and written once, 12 bytes, 0.6 GB in all, out of the shared cache.
// Reached at 2.9 GHz: 1042 ms (0.80 of the peak), 47 ms of it in cross_entropy_chunk; 1059 ms with bfloat16 inputs.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace dalle {

// How many rows count, and the first of them whose target is no class, or -1.
struct CrossEntropyTargets {
  int64_t counted, outside;
};

inline CrossEntropyTargets cross_entropy_targets(const int64_t* target, int64_t stride, int64_t rows, int64_t classes,
                                                 int64_t ignore_index) {
  CrossEntropyTargets found{0, -1};
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t c = target[r * stride];
    if (c == ignore_index) continue;
    ++found.counted;
    if ((c < 0 || c >= classes) && found.outside < 0) found.outside = r;
  }
  return found;
}

// Class c of row r has logit x = logits[c * rows + r] + bias[c], its row the maximum m and the sum s of exp(x - m).
// Writes loss[r] = log s + m - x of the target, and adds the losses to *total in the order of the rows. With
// `row_scale`, the gradient that reaches each loss, it also overwrites the logits by exp(x - m), less s at the target,
// and writes row_factor[r] = row_scale / s: the product of the two is the gradient of the logit. A row whose target is
// ignore_index has loss, logits and factor 0; one whose target is no class has a loss and a factor of NaN.
struct CrossEntropyChunk {
  float* logits;
  int64_t classes, rows;
  const float* bias;      // nullptr: none
  const int64_t* target;  // of each row, target_stride apart
  int64_t target_stride;
  int64_t ignore_index;
  const float* row_scale;  // nullptr: no gradient is wanted and the logits are only read
  int64_t row_scale_stride;
  float* loss;  // nullptr: only their sum is wanted
  double* total;
  float* row_factor;
  double* bias_sums;  // [classes]: the gradients of the chunk's logits are added; nullptr: none are
  float* workspace;  // cross_entropy_workspace(classes, rows) floats
  int threads;
};

// A sum of float32 terms into a gradient of 16 bits an element, which rounds only once: until the last term is there
// the gradient's memory holds the upper half of each float32 sum, and `low` the eight bits below it.
struct GradientSum {
  const float* term;
  uint16_t* gradient;
  uint8_t* low;
  int64_t count;
  bool first, last;
  Dtype dtype;  // of the gradient: float16 or bfloat16
  int threads;
};

// output = input * *factor, rounded once.
struct GradientScale {
  const void* input;
  void* output;
  int64_t count;
  Dtype dtype;  // any but float64
  const float* factor;
  int threads;
};

// The classes are taken in segments of this many, whatever the number of threads, so that no sum depends on it.
constexpr int64_t CROSS_ENTROPY_SEGMENT = 512;

inline int64_t cross_entropy_workspace(int64_t classes, int64_t rows) {
  const int64_t segments = (classes + CROSS_ENTROPY_SEGMENT - 1) / CROSS_ENTROPY_SEGMENT;
  return (segments + 3) * rows;
}

DALLE_DECLARE_CPU_KERNEL(cross_entropy_chunk, CrossEntropyChunk)
DALLE_DECLARE_CPU_KERNEL(gradient_sum, GradientSum)
DALLE_DECLARE_CPU_KERNEL(gradient_scale, GradientScale)

}  // namespace dalle
