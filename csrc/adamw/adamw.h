// Family adamw: AdamW with moments in the formats 1-6-9 and 0-6-10 (arXiv 2102.12092, B.2), in one pass over memory.
//
// Floor: bytes. With 16-bit parameters, gradients and codes 8 are read and 6 written for a parameter, half of AdamW in
// float32: 470 MB for 2^25 parameters, 7.7 ms at the 61 GB/s that updates in place reach on 2 cores of an EPYC
// (Zen 3). Operations: about 50 vector instructions for 8 parameters, a root and a quotient among them; at most four of
// them start in a cycle, so AVX2 needs at least 12.5 cycles for 8 parameters: 8.1 ms on these cores at 3.2 GHz.
//
// Reached there (bench/bench_adamw.py): 12.0 to 13.0 ms, against torch's fused AdamW in float32, which memory binds, at
// 13.4 to 20.6 ms, as the machine's memory happens to be: 1.07 to 1.6 times as long. That was measured before the loop
// kept its addresses in registers; since then the same work on data in the second-level cache takes 11.2 ms (bfloat16;
// before, 11.7) and 10.4 ms (float16; before, 11.0), twice one thread's speed taken for two: the instructions bind, not
// memory, and not root and quotient alone, without which it would still take 10.0 ms (bfloat16, before).
//
// Stochastic rounding takes 8.8 ms for 2^21 bfloat16 parameters on two threads where rounding to nearest takes 1.6.
//
// On CUDA 319 million parameters in 289 tensors are 4.5 GB, 1.05 ms for an H200, which copies 4.25 TB/s; some 60
// instructions an element stay below that. Reached there: 1.12 ms with 16-bit parameters and codes, 2.3 times the speed
// of torch's fused AdamW in float32, and 1.56 ms with float32 parameters and gradients (floor 1.50 ms). Stochastic
// rounding of 319 million parameters in 76 tensors takes 1.40 ms where rounding to nearest takes 1.22.
#pragma once

#include "common/dtype.h"
#include "common/isa.h"

namespace dalle {

// One parameter and all that its update reads and writes. The arrays are of `count` elements that lie in memory in the
// same order; none overlaps another.
struct AdamW16Tensor {
  void* parameter;       // of AdamW16Step::parameter_dtype
  const void* gradient;  // of AdamW16Step::gradient_dtype
  void* first_moment;    // codes of 1-6-9, or float
  void* second_moment;   // codes of 0-6-10, or float
  float* step;           // updates so far; 1 is added
  int64_t count;
  int64_t number;        // of the parameter, for the noise of stochastic rounding
};

// With g = gradient / *grad_scale and t = *step + 1:
//   m = beta1 * m + (1 - beta1) * g
//   v = min(beta2 * v + (1 - beta2) * g^2, max_variance)
//   parameter = (1 - lr * weight_decay) * parameter - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)
// in float, rounded as dalle_kernels/adamw/reference.py does: every build gives its bits. The parameter's update takes
// m and v before they are rounded to their codes. Any positive scale serves. Where *found_nonfinite, nothing changes.
// With stochastic_rounding 16-bit parameters are rounded as stochastically_rounded there does.
struct AdamW16Step {
  static constexpr int FACTORS = 7;
  const AdamW16Tensor* tensors;
  int64_t tensor_count;
  Dtype parameter_dtype, gradient_dtype;  // float32, float16 or bfloat16
  bool first_moment_coded, second_moment_coded;
  double lr, beta1, beta2, eps, weight_decay, max_variance;
  const float* grad_scale;         // or nullptr, which means 1
  const uint8_t* found_nonfinite;  // or nullptr, which means 0
  float* factors;                  // CUDA only: room for FACTORS of each tensor
  int threads;                     // CPU only
  bool stochastic_rounding;
  uint64_t rounding_seed;
};

DALLE_DECLARE_CPU_KERNEL(adamw16_step, AdamW16Step)

namespace cuda {
const char* adamw16_step(const AdamW16Step&, void* stream);
}  // namespace cuda

}  // namespace dalle
