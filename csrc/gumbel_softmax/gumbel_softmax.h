// Family gumbel_softmax: samples of the dVAE's relaxed codes, the KL of their posterior to the uniform prior, and the
// product of a sample with the codebook (arXiv 2102.12092, section 2.1); dalle_kernels/gumbel_softmax defines them.
//
// y = softmax((logits + gumbel) / tau) along the columns of each row, gumbel being the noise of
// dalle_kernels/philox.py; kl = sum q ln(q columns), q = softmax(logits).
//
// Floor: the forward reads the logits and writes y once, the backward reads three tensors and writes one. On a CPU the
// noise costs more than that: about 50 instructions a vector for Philox and the uniform number, 40 for two logarithms,
// 20 for the softmax's exponential and 25 more for the KL. At three a cycle that is about 40 cycles for 8 elements on
// AVX2 without the KL, 50 ms for [8192, 8192] on two cores at 3.2 GHz; copying its 268 MB takes 16 ms there.
// Reached on two cores of an EPYC (Zen 3), AVX2, other work on the machine, into memory that was touched before: on
// [8192, 8192] 14.7 to 18.6 times (bfloat16 14.4 to 18.7) the speed of F.gumbel_softmax, and with the KL, forward and
// backward along dimension 1 of [8, 8192, 32, 32], 9.9 to 10.8 times (9.5 to 11.6) that of eager torch. There memory is
// waited for, and each page that a column lies in is looked up: the float32 backward reads whole columns of 1024 rows
// (by tiles of 64 rows it takes 1.45 times as long, bfloat16 1.13), and the float32 forward columns of 256 rows, for
// which it writes y twice (by blocks of 32 rows, which leave y alone, it takes 1.08 times as long).
//
// The product with a codebook of width W and its gradients add 6 * rows * columns * W operations: for [8, 8192, 32, 32]
// and W = 128 that is 51.5 GFLOP, 318 ms at the 162 GFLOP/s of a large GEMM there, beside the noise of three draws,
// 150 ms. Reached: 1.1 to 1.6 s forward and backward (forward alone 0.30 to 0.42), 3.1 to 4.6 times the speed of eager
// torch.
//
// On CUDA, 2^26 logits: reading and writing them takes 125 us in float32 and 62 us in 16 bits at the 4.3 TB/s that an
// H200 copies; its multiprocessors issue some 50 instructions an element of the forward with KL in 110 us, most of them
// for the noise, so arithmetic binds in 16 bits. The backward moves twice the bytes, 250 and 125 us. Reached, dim = -1
// of [8192, 8192]: forward with KL 167 us (float32) and 154 us (bfloat16), its backward 270 and 177 us; dim = 1 of
// [8, 8192, 32, 32]: 265 and 297 us, and 500 and 450 us; of channels-last logits and grad_y, whose results are
// contiguous, 299 and 308 us, and 457 and 391 us. The noise by itself takes 94 us, 57 of them the rounds of Philox, 2.6
// times what their instructions take to issue.
//
// Scratch space on a CPU is per thread: up to four tiles of 16 KiB, nearly as much for the sums of their rows, and
// where a soft sample is drawn up to 7/8 MiB of a block's exponentials, the rest of which is computed again, with a
// maximum for each row of each tile: 32 KiB at 8192 columns and 32 rows, and from there in proportion to the columns.
// Where y keeps the exponentials only such maxima are left, of eight blocks of 64 rows (512 KiB at 8192 columns) or of
// fewer, but at least two, that take up to 7/8 MiB. The codebook's products take up to 200 floats a thread for each
// column of the codebook's width, and their backward also keeps about 7 floats a row.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/strided.h"

namespace dalle {

// A tensor seen as rows of columns: `rows` has its other dimensions in order, of the same sizes for all tensors of a
// call. Strides are in elements and may be anything, but what is written must not overlap.
struct RowTensor {
  void* data;
  Strided rows;
  int64_t column_stride;
};

struct GumbelNoise {
  const int64_t *seed, *offset;
  const float* tau;
};

struct GumbelSoftmax {
  Dtype dtype;  // of logits and y: any but float64
  int64_t columns;
  bool hard;
  GumbelNoise noise;
  RowTensor logits;
  RowTensor y;  // contiguous, written in full
  float* kl;    // one number a row, contiguous, or nullptr
  int threads;
};

struct GumbelSoftmaxBackward {
  Dtype dtype;  // of grad_y, logits, y and grad_logits: any but float64
  int64_t columns;
  bool hard;  // the soft sample is drawn again, and y is not read
  GumbelNoise noise;
  RowTensor grad_y, logits, y;
  RowTensor grad_kl;      // float32, one column; data is nullptr where there is none
  RowTensor grad_logits;  // contiguous, written in full
  int threads;
};

// [columns, width], of any strides.
struct Codebook {
  void* data;
  Dtype dtype;  // any but float64
  int64_t width, column_stride, width_stride;
};

struct GumbelCodebook {
  Dtype dtype;  // of the logits: any but float64
  int64_t columns;
  GumbelNoise noise;
  RowTensor logits;
  Codebook codebook;
  RowTensor embedding;  // of the codebook's dtype, `width` columns, written in full
  float* kl;            // one number a row, contiguous
  int threads;
};

struct GumbelCodebookBackward {
  Dtype dtype;  // of the logits and their gradient: any but float64
  int64_t columns;
  GumbelNoise noise;
  RowTensor grad_embedding;  // of the codebook's dtype
  RowTensor grad_kl;         // float32, one column
  RowTensor logits;
  Codebook codebook;
  RowTensor grad_logits;  // written in full
  Codebook grad_codebook;  // of the codebook's dtype and width, written in full
  int threads;
};

DALLE_DECLARE_CPU_KERNEL(gumbel_softmax, GumbelSoftmax)
DALLE_DECLARE_CPU_KERNEL(gumbel_softmax_backward, GumbelSoftmaxBackward)
DALLE_DECLARE_CPU_KERNEL(gumbel_codebook, GumbelCodebook)
DALLE_DECLARE_CPU_KERNEL(gumbel_codebook_backward, GumbelCodebookBackward)

namespace cuda {
const char* gumbel_softmax(const GumbelSoftmax&, void* stream);
const char* gumbel_softmax_backward(const GumbelSoftmaxBackward&, void* stream);
}  // namespace cuda

}  // namespace dalle
