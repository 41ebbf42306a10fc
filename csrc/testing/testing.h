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

DALLE_DECLARE_CPU_KERNEL(elementwise, Elementwise)

}  // namespace dalle
