// Family grad_scale: the casts around a resblock's backward under its own loss scale (arXiv 2102.12092, 2.4, Fig. 4).
//
// Floor: bytes. Scaling float32 into 16 bits reads 4 and writes 2 bytes a number, and so does the way back; plain torch
// makes four passes of it, with float32 and bool tensors in between. The few operations hide behind memory.
//
// Reached on 2 cores of an EPYC (Zen 3), 2^24 numbers in 16 tensors (bench/bench_grad_scale.py): from 5.7 to 9.1 ms,
// 8 to 17 times as fast as eager torch. A copy of as many bytes takes 2.9 to 5.1 ms, into memory that is there already;
// the results here are fresh memory.
//
// On CUDA 319 million numbers in 289 tensors are 1.9 GB, 0.45 ms for an H200, which copies 4.25 TB/s. Reached there:
// 0.45 ms from float32 to float16 and 0.48 ms from bfloat16 to float32; eager torch, which waits for its host, 23 ms.
#pragma once

#include "common/dtype.h"
#include "common/isa.h"

namespace dalle {

struct GradScaleTensor {
  const void* input;
  void* output;  // written in full, in the input's order
  int64_t count;
};

// output = filter(cast(input * *scale)): the product in float, the cast to output_dtype to nearest even. filter makes 0
// of infinities and NaN; *nonfinite becomes 1 if it met one in any tensor, else 0.
struct ScaleCastFilter {
  const GradScaleTensor* tensors;
  int64_t tensor_count;
  Dtype input_dtype, output_dtype;  // float32, float16 or bfloat16
  const float* scale;
  uint8_t* nonfinite;
  int threads;  // CPU only
};

// output = cast(filter(input)) / *scale, in float.
struct FilterCastUnscale {
  const GradScaleTensor* tensors;
  int64_t tensor_count;
  Dtype input_dtype;  // float32, float16 or bfloat16
  const float* scale;
  uint8_t* nonfinite;
  int threads;  // CPU only
};

DALLE_DECLARE_CPU_KERNEL(scale_cast_filter, ScaleCastFilter)
DALLE_DECLARE_CPU_KERNEL(filter_cast_unscale, FilterCastUnscale)

namespace cuda {
const char* scale_cast_filter(const ScaleCastFilter&, void* stream);
const char* filter_cast_unscale(const FilterCastUnscale&, void* stream);
}  // namespace cuda

}  // namespace dalle
