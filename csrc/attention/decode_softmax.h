// A softmax over keys that a warp reads row by row, for one query: eight numbers a thread, LANES threads a key.
//
// Arithmetic is plain: with one query a matrix product would leave fifteen sixteenths of its rows empty, and beside the
// bytes it is small. The thread's keys are all asked for before the first is used.
#pragma once

#include "attention/decode.h"
#include "attention/decode_slots.h"
#include "common/ahead.h"
#include "common/mma.h"
#include "common/pairs.h"

namespace dalle::cuda {

struct DecodeLaunch {
  DecodePattern pattern;
  TokenHeads q, k_new, v_new;
  void *text, *image, *out;
  const void* place;  // of the token, on the device, 8 bytes or 4; or nullptr: then it is `position`
  bool wide_place;
  int position, prompts, samples, heads;
  float exponent;  // scale, in exponents of 2
};

constexpr float LOWEST = -3.4028234663852886e38f;  // where a maximum starts: finite, so that no key seen needs no care

// The token's place in the stream, or -1 where there is no step. A text that samples share is there already.
__device__ __forceinline__ int place_of(const DecodeLaunch& p, bool text) {
  if (p.place == nullptr) return p.position;
  const int64_t place = p.wide_place ? *static_cast<const int64_t*>(p.place) : *static_cast<const int32_t*>(p.place);
  const int64_t least = text ? 0 : p.pattern.text_len;
  const int64_t end = p.pattern.text_len + static_cast<int64_t>(p.pattern.height) * p.pattern.width;
  return place >= least && place < end ? static_cast<int>(place) : -1;
}

__device__ __forceinline__ float power(float exponent) { return exp2f(exponent); }

template <class Element>
__device__ __forceinline__ const FourPairs* pack_of(const TokenHeads& tensor, int row, int head, int column) {
  return reinterpret_cast<const FourPairs*>(static_cast<const Element*>(tensor.data) + row * tensor.row_stride +
                                       head * tensor.head_stride + column);
}

// Keys and values of one head, one after the other: of a prompt's text, or of a sample's image.
template <class Element, int HEAD_DIM>
struct HeadCache {
  Element *keys, *values;

  // `number` of `count` heads in all, each of `slots` keys.
  __device__ HeadCache(void* cache, int64_t number, int64_t count, int slots) {
    const int64_t size = static_cast<int64_t>(slots) * HEAD_DIM;
    keys = static_cast<Element*>(cache) + number * size;
    values = keys + count * size;
  }
  __device__ static HeadCache text_of(const DecodeLaunch& p, int prompt, int head) {
    const int64_t prompts = p.prompts;
    return {p.text, static_cast<int64_t>(prompt) * p.heads + head, prompts * p.heads, p.pattern.text_len};
  }
  __device__ static HeadCache image_of(const DecodeLaunch& p, int row, int head) {
    const int64_t prompt = row / p.samples, samples = p.samples;
    return {p.image, (prompt * p.heads + head) * samples + row % p.samples, p.prompts * samples * p.heads,
            p.pattern.slots};
  }
  // The eight numbers from `column` on of the token's key and value.
  __device__ __forceinline__ void store(int slot, int column, const FourPairs& key, const FourPairs& value) const {
    const int64_t at = static_cast<int64_t>(slot) * HEAD_DIM + column;
    *reinterpret_cast<FourPairs*>(keys + at) = key;
    *reinterpret_cast<FourPairs*>(values + at) = value;
  }
};

template <class Element, int HEAD_DIM>
struct RowSoftmax {
  static constexpr int LANES = HEAD_DIM / 8, KEYS = 32 / LANES;  // KEYS: that a warp takes at once
  float query[8], weighted[8], maximum = LOWEST, total = 0;

  // The keys and values that a thread holds.
  template <int COUNT>
  struct Loaded {
    FourPairs keys[COUNT], values[COUNT];
    uint32_t seen = 0;

    __device__ __forceinline__ void take(int i, bool is_seen, const Element* key, const Element* value) {
      if (is_seen) {
        keys[i] = *reinterpret_cast<const FourPairs*>(key), values[i] = *reinterpret_cast<const FourPairs*>(value);
        seen |= 1u << i;
      } else {
        keys[i] = FourPairs{}, values[i] = FourPairs{};
      }
    }
  };

  __device__ __forceinline__ void set_query(const FourPairs& pack, float exponent) {
    numbers_of(pack, query, Element{});
#pragma unroll
    for (float& number : query) number *= exponent;
  }

  __device__ __forceinline__ float score(const FourPairs& key) const {
    float numbers[8], sum = 0;
    numbers_of(key, numbers, Element{});
#pragma unroll
    for (int i = 0; i < 8; ++i) sum = fmaf(query[i], numbers[i], sum);
#pragma unroll
    for (int bits = 1; bits < LANES; bits *= 2) sum += __shfl_xor_sync(~0u, sum, bits);
    return sum;
  }

  // Where `begins`, the softmax begins with the token's own key. No step makes the result NaN.
  __device__ __forceinline__ void begin(const FourPairs& key, const FourPairs& value, bool begins, bool is_step) {
    const float own = score(key);
    if (!begins) {
#pragma unroll
      for (float& number : weighted) number = 0;
      return;
    }
    maximum = own, total = is_step ? 1.0f : __uint_as_float(0x7fc00000u);
    numbers_of(value, weighted, Element{});
  }

  template <int COUNT>
  __device__ __forceinline__ void meet(const Loaded<COUNT>& loaded) {
    float weights[COUNT], largest = maximum;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const float sum = score(loaded.keys[i]);
      weights[i] = loaded.seen >> i & 1 ? sum : -INFINITY;
      largest = fmaxf(largest, weights[i]);
    }
    const float shrink = power(maximum - largest);
    maximum = largest, total *= shrink;
#pragma unroll
    for (float& number : weighted) number *= shrink;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      float numbers[8];
      numbers_of(loaded.values[i], numbers, Element{});
      const float weight = power(weights[i] - largest);
      total += weight;
#pragma unroll
      for (int j = 0; j < 8; ++j) weighted[j] = fmaf(weight, numbers[j], weighted[j]);
    }
  }

  // The warp's keys together, in every thread.
  __device__ __forceinline__ void join() {
#pragma unroll
    for (int bits = LANES; bits < 32; bits *= 2) {
      const float other = __shfl_xor_sync(~0u, maximum, bits), largest = fmaxf(maximum, other);
      const float mine = power(maximum - largest), theirs = power(other - largest);
      maximum = largest;
      total = total * mine + __shfl_xor_sync(~0u, total, bits) * theirs;
#pragma unroll
      for (float& number : weighted) number = number * mine + __shfl_xor_sync(~0u, number, bits) * theirs;
    }
  }
};

}  // namespace dalle::cuda
