// Decoding: attention of one new token a sample over the keys and values of a cache, which takes the new ones first.
//
// The samples of a prompt share its text keys, stored once a prompt; image keys are stored once a sample, and of them
// only what the pattern can still see. dalle_kernels/attention/cache.py decides which slots those are.
//
// Floor: every visible key and value is read once a step, (text + samples * image) * 2 * head_dim elements a prompt and
// head, at the bandwidth of wherever the cache lies; arithmetic is small beside it up to about 8 samples a prompt.
// Reached on two Zen 3 threads (AVX2): text 256, 32x32 grid, 4 x 8 heads of 64, float32, last token: row 50, column 49,
// conv 55 us at best for 4.7 to 5.2 MB: 95 GB/s, what a plain sum reads from the L3 cache; 65 to 75 us with other work
// on the machine. bfloat16 takes the same time: half of the bytes, but they are widened.
//
// Floor on an H200 (4.3 TB/s), bfloat16, heads of 64, text 256, 32x32 grid, last token: 8 x 62 heads 8.5 us (row,
// column) and 9.4 (conv), 32 samples of one prompt, 62 heads, 4.8 and 8.2. Reached, the launch included:
// 18.4 and 20.0 us, with samples 16.2 (row), 16.7 (column) and 20.6 (conv), where an empty kernel takes 3.3.
//
// Scratch space on a CPU, in floats: threads * S * (2 W + K), where a task scores K visible keys for S samples of a
// prompt, 32 at most, and W is head_dim; K and W are rounded up to whole registers. Where there are fewer than 8 heads
// (of all prompts and groups of samples) their keys are cut into tasks of 128 keys or more, and a row and head takes
// another W and a register for each.
#pragma once

#include <cstdint>

#include "attention/attention.h"
#include "common/dtype.h"
#include "common/isa.h"

namespace dalle {

// A tensor [prompts * samples, heads, 1, head_dim]: strides in elements.
struct TokenHeads {
  const void* data;
  int64_t row_stride, head_stride, element_stride;
};

// Keys and values [2, prompts, heads, ..., head_dim], contiguous.
struct DecodeAttention {
  Dtype dtype;  // of all tensors: any but float64
  int64_t prompts, samples, heads, head_dim;
  float scale;
  TokenHeads q, k_new, v_new;
  void* text;                    // [2, prompts, heads, text_capacity, head_dim]
  void* image;                   // [2, prompts, heads, samples, image_capacity, head_dim]
  int64_t text_capacity, image_capacity;
  int64_t text_keys;             // visible: the first ones
  int64_t image_keys;            // visible: those in image_slots, or else the first ones
  const int32_t* image_slots;    // or nullptr
  int64_t new_key;               // which visible key, text before image, is the new one: written before it is read
  void* out;                     // [prompts * samples, heads, head_dim], contiguous, written in full
  int threads;
};

DALLE_DECLARE_CPU_KERNEL(decode_attention, DecodeAttention)

// The same on a GPU, where the kernel finds the visible slots itself: the token's place may be known there alone.
// bfloat16 and float16, head_dim 64 or 128; all tensors at multiples of 16 bytes, an element_stride of 1.
struct DecodeStep {
  Dtype dtype;
  int64_t prompts, samples, heads, head_dim;
  float scale;
  Pattern pattern;  // `seq` is not read
  TokenHeads q, k_new, v_new;
  void *text, *image;  // as above, text_capacity being the pattern's text_len
  int64_t image_capacity;
  void* out;
  int64_t position;    // in the stream, if `place` is nullptr
  const void* place;   // or where it lies on the device; outside of the stream, or in a text that samples share, the
  bool wide_place;     // output is NaN and the cache stays as it is. 8 bytes, else 4
  bool chained;        // the kernels just before this one write neither cache nor place: it may start while they end
};
namespace cuda {
const char* decode_attention(const DecodeStep&, void* stream);
const char* decode_attention_refusal(const DecodeStep&);  // why it would do nothing, or nullptr
}  // namespace cuda

}  // namespace dalle
