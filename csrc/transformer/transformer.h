// Family transformer: one decode step through a stack of transformer layers, each an attention resblock and an MLP
// resblock.
//
// x += W_o attention(W_qkv norm(x)), then x += W_2 gelu(W_1 norm(x)); biases everywhere. The attention is the step of
// attention/decode.h, the matrices are those of linear/linear.h, one call for all of them because the way through
// Python and torch between them takes longer than the arithmetic of a small layer.
//
// Floor: that of its parts, the weights read once and the visible keys and values read once.
// Reached on two Zen 3 threads (AVX2), float32: dim 512, 8 layers, 1 row, with embedding and logits: 118 MB of weights
// in 4.7 ms at best, 25 GB/s of about 30; dim 256, 6 layers, 8 rows: 80 million operations in 1.4 ms at best.
#pragma once

#include <cstdint>

#include "attention/decode.h"

namespace dalle {

struct AffineWeights {
  const void *weight, *bias;  // contiguous
};

struct TransformerLayer {
  AffineWeights attention_norm;   // [dim]
  AffineWeights query_key_value;  // [3 * heads * head_dim, dim]: all queries, then all keys, then all values
  AffineWeights projection;       // [dim, heads * head_dim]
  AffineWeights mlp_norm;         // [dim]
  AffineWeights expansion;        // [hidden, dim]
  AffineWeights contraction;      // [dim, hidden]
  void *text, *image;             // the cache, and below what of it is seen: see DecodeAttention
  int64_t text_keys, image_capacity, image_keys;
  const int32_t* image_slots;
  int64_t new_key;
  Pattern pattern;  // read on CUDA, instead of what is seen: see DecodeStep
};

struct DecodeLayers {
  Dtype dtype;  // of all tensors: any but float64
  int64_t prompts, samples, heads, head_dim, dim, hidden, text_capacity;
  float scale, epsilon;
  const TransformerLayer* layers;
  int64_t count;
  void* x;  // [prompts * samples, dim], contiguous, read and written
  int threads;
  int64_t position;    // on CUDA, as in DecodeStep
  const void* place;
  bool wide_place;
  void* scratch;       // on CUDA: prompts * samples * (4 * heads * head_dim + hidden) numbers, at a multiple of 16
                       // bytes
};

DALLE_DECLARE_CPU_KERNEL(decode_layers, DecodeLayers)

// bfloat16 and float16, up to 8 rows, head_dim 64 or 128, dim and hidden multiples of 32; all tensors at multiples
// of 16 bytes.
namespace cuda {
const char* decode_layers(const DecodeLayers&, void* stream);
const char* decode_layers_refusal(const DecodeLayers&);  // why it would do nothing, or nullptr; takes no x and scratch
}  // namespace cuda

}  // namespace dalle
