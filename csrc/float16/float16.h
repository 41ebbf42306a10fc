// Family float16: encoding to and decoding from the 16-bit formats 1-6-9 and 0-6-10 (arXiv 2102.12092, B.2 and E.2).
//
// Layout, from the top bit down: sign (1-6-9 only), 6 exponent bits, significand. Exponent code e means 2^(e-60); every
// code is a normal number save the all-zero one (sign aside), which is 0. There is no subnormal, no infinity, no NaN.
//
// Floor: bytes. float32 takes 4 + 2 bytes an element either way, a 16-bit dtype 2 + 2, float64 8 + 2; the dozen integer
// operations an element hide behind memory from AVX2 on and on any GPU. A copy of as many bytes is the yardstick:
// 2^26 float32 elements are 403 MB, 84 us of an H200's 4.8 TB/s peak, 94 us of the 4.3 TB/s that its copies reach.
//
// Reached: on 2 cores of an EPYC (Zen 3, AVX2) both directions of both formats take from 94 % to 131 % of the bandwidth
// of torch's copy of equal bytes, for 2^24 elements of float32, bfloat16 and float16 (bench/bench_float16.py). On an
// H200, which copies 4.25 TB/s, 2^28 elements are encoded at 4.3 TB/s and decoded at 4.0 (float32), both at 4.0 to 4.1
// in bfloat16.
#pragma once

#include "common/dtype.h"
#include "common/isa.h"
#include "common/strided.h"

namespace dalle {

enum class Float16Format : int { fp169 = 0, fp0610 = 1 };

// codes[i] = encoding of input element i, in the order of `shape`; codes is contiguous and written in full.
// *nonfinite becomes 1 if any input is an infinity or NaN, else 0.
struct Float16Encode {
  const void* input;
  Dtype dtype;  // of the input: any
  Strided shape;  // of the input
  uint16_t* codes;
  uint8_t* nonfinite;
  Float16Format format;
  int threads;  // CPU only
};

// output[i] = value of code i, in the order of `shape`, rounded to nearest even where dtype cannot hold it.
struct Float16Decode {
  const uint16_t* codes;
  Strided shape;  // of the codes
  void* output;  // contiguous, written in full
  Dtype dtype;   // of the output: any
  Float16Format format;
  int threads;  // CPU only
};

DALLE_DECLARE_CPU_KERNEL(float16_encode, Float16Encode)
DALLE_DECLARE_CPU_KERNEL(float16_decode, Float16Decode)

namespace cuda {
const char* float16_encode(const Float16Encode&, void* stream);
const char* float16_decode(const Float16Decode&, void* stream);
}  // namespace cuda

}  // namespace dalle
