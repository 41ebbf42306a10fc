// Family attention: softmax attention over text and image tokens under a sparse causal pattern (arXiv 2102.12092, B.1).
//
// out[i] = sum_j p_ij v[j], p_i = softmax over the visible j of scale * q[i] . k[j]. Which keys are visible is defined
// by the mask of dalle_kernels/attention/pattern.py; plan.cpp holds the same as tiles.
//
// Floor: 4 * head_dim operations a visible pair forward and 10 * head_dim backward; memory is small beside them on a
// CPU.
//
// Scratch space, in floats, for N = seq (and up to one more for each of text and image), W = head_dim rounded up to
// whole registers pairs (P = 8, 16 or 32 floats: portable, AVX2, AVX-512), M <= N the most keys that P queries see:
//   forward   threads * (2 N W + 6 P W + 2 P M)
//   backward  heads' * 2 N W + threads * (10 P W + 4 P M) + sums * 2 N W, where heads' = sums = threads for 8 heads (of
//             all samples) or more; for fewer, heads' = heads, and sums = heads * ceil(8 / heads), the segments that a
//             head's tiles are cut into
// and a few numbers beside. Never N x N.
//
// Reached on two cores of an AMD EPYC (Zen 3, AVX2, about 175 GFLOP/s in a large GEMM), one thread, 8 heads of 256 text
// and 32 x 32 image tokens, head_dim 64, float32: row forward in 10.1 ms, 67 GFLOP/s on visible pairs, and conv in
// 12.2 ms. Of row's time the products take 75 %, at 90 GFLOP/s, the softmax 8 %, packing 6 %. On two threads, 4 x 8
// heads (bench/bench_attention.py, on a slow host), the forward of row, column and conv reached 47 to 56 % of the
// floor's rate in float32 and 50 to 56 % in bfloat16, the backward 43 to 55 % in both. Of a single head two threads
// make the forward 1.6 to 1.9 times as fast as one does, forward and backward 1.5 to 2.1 times.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace dalle {

// The numbers are those that dalle_kernels/attention/ops.py passes: the order of pattern.KINDS.
enum class PatternKind : int { causal = 0, row = 1, column = 2, conv = 3, axial_row = 4, conv_corner = 5 };

// `seq` tokens, a prefix of text_len text tokens and a height x width grid in raster order.
struct Pattern {
  PatternKind kind;
  int64_t seq, text_len, height, width, kernel_size;
};

// One tensor [batch, heads, seq, head_dim]: strides in elements, the last one being 1.
struct Heads {
  void* data;
  int64_t batch_stride, head_stride, token_stride;
};

struct SparseAttention {
  Dtype dtype;  // of q, k, v and out: any but float64
  int64_t batch, heads, head_dim;
  Pattern pattern;
  float scale;
  Heads q, k, v;
  Heads out;   // written in full
  float* lse;  // nullptr, or the natural log of the sum of exp(scale * q . k), [batch, heads, seq], contiguous,
               // written in full
  int threads;
  int64_t* workspace;  // if not nullptr: takes the bytes of scratch space of the call, which then computes nothing
};

// On the CPU it needs neither out nor lse: the softmax statistics are computed again. With logits of 1e4, lse in
// float32 is off by up to 5e-4, which would be the relative error of every probability.
struct SparseAttentionBackward {
  Dtype dtype;  // of all tensors: any but float64
  int64_t batch, heads, head_dim;
  Pattern pattern;
  float scale;
  Heads grad_out, q, k, v;
  Heads dq, dk, dv;  // written in full
  int threads;
  int64_t* workspace;  // as above; CUDA's is `scratch`, which the caller provides
  Heads out{};         // of the forward, as is lse: read on CUDA only
  const float* lse = nullptr;
  void* scratch = nullptr;  // a multiple of 256 bytes
};

DALLE_DECLARE_CPU_KERNEL_WITH_BF16(sparse_attention, SparseAttention)
DALLE_DECLARE_CPU_KERNEL_WITH_BF16(sparse_attention_backward, SparseAttentionBackward)

// On Hopper GPUs only, bfloat16 and float16, head_dim 64 and, of the forward, 128; `threads` is not read, nor is the
// forward's `workspace`. Heads are read and written 16 bytes at once: their addresses and strides are multiples of
// that.
namespace cuda {
const char* sparse_attention(const SparseAttention&, void* stream);
const char* sparse_attention_refusal(const SparseAttention&);  // why it would do nothing, or nullptr; takes no out
const char* sparse_attention_backward(const SparseAttentionBackward&, void* stream);
const char* sparse_attention_backward_refusal(const SparseAttentionBackward&);  // takes no gradients of q, k and v
}  // namespace cuda

}  // namespace dalle
