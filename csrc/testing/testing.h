// Family testing: nothing but a way for the tests to reach the functions of csrc/common.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace dalle {

enum class ElementwiseFunction : int { exponential = 0, natural_log = 1, log1p = 2 };

// output[i] = function(input[i]), both contiguous.
struct Elementwise {
  ElementwiseFunction function;
  const float* input;
  float* output;
  int64_t count;
};

// v[column][row] = complement_uniform of dalle_kernels/philox.py, for the rows from `offset` on; both numbers are
// multiples of 64.
struct UniformNoise {
  uint64_t seed, offset;
  int64_t columns, rows;
  float* v;
};

DALLE_DECLARE_CPU_KERNEL(elementwise, Elementwise)
DALLE_DECLARE_CPU_KERNEL(uniform_noise, UniformNoise)

}  // namespace dalle
