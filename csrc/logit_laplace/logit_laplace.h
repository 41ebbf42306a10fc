// Family logit_laplace: the logit-Laplace negative log likelihood of the dVAE's decoder (arXiv 2102.12092, A.3).
//
// With d = logit(x) - mu: loss = |d| / b + ln b + ln 2 + ln x + ln(1 - x).
//
// Floor: bytes where the tensors do not fit a cache: in float32 12 an element forward (16 without a reduction) and 20
// backward. Where they do, arithmetic: forward two logarithms and an exponential, about 75 instructions a register,
// backward a quotient in place of one logarithm, about 60.
// Reached on two Zen 3 cores (AVX2) with [8, 3, 256, 256] float32, mu and log_b halves of one decoder's output: forward
// 1.4 ms and backward 1.8 ms, 14 and 17 GB/s; the whole with autograd 3.8 ms, where torch's eager formula takes 18.6.
// From a channels-last decoder 2.6 and 3.0 ms: every channel's pass reads all cache lines again.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/strided.h"

namespace dalle {

// 1 / b below 2^-126 counts as 0.
//
// The tensors of one call have one shape, each its own strides (in elements) and dtype (any but float64).
struct LogitLaplaceTensor {
  const void* data;
  Dtype dtype;
  Strided shape;
};

// Each value's loss in the order of the shape, or with `partial` their sum over `divisor` alone.
struct LogitLaplaceLoss {
  LogitLaplaceTensor x, mu, log_b;
  float* loss;      // contiguous
  double* partial;  // nullptr, or logit_laplace_blocks(elements): sums of blocks of a fixed size, which are then added
                    // in order, so that the loss does not depend on the number of threads
  double divisor;
  int threads;
};

// grad_mu = -grad sign(d) / b and grad_log_b = grad (1 - |d| / b), where grad / divisor is what reaches each loss. The
// sign of 0 and of NaN is 0.
struct LogitLaplaceLossBackward {
  LogitLaplaceTensor grad, x, mu, log_b;
  void* grad_mu;     // contiguous, of mu's dtype
  void* grad_log_b;  // contiguous, of log_b's dtype
  double divisor;
  int threads;
};

constexpr int64_t LOGIT_LAPLACE_BLOCK = 2048;
constexpr int64_t logit_laplace_blocks(int64_t elements) {
  return (elements + LOGIT_LAPLACE_BLOCK - 1) / LOGIT_LAPLACE_BLOCK;
}

DALLE_DECLARE_CPU_KERNEL(logit_laplace_loss, LogitLaplaceLoss)
DALLE_DECLARE_CPU_KERNEL(logit_laplace_loss_backward, LogitLaplaceLossBackward)

}  // namespace dalle
