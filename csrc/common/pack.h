// Neighbouring elements that a thread of a CUDA kernel loads and stores at once, and the processor's own conversions.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/dtype.h"
#include "common/instructions.h"
#include "common/pairs.h"

namespace dalle::cuda {

constexpr int ACCESS_BYTES = 16;  // the most that one instruction of a thread loads or stores

template <class T, int COUNT>
struct alignas(sizeof(T) * COUNT) Pack {
  static_assert(sizeof(T) * COUNT <= ACCESS_BYTES, "a pack is one access");
  T elements[COUNT];
};

// How many elements of each type the widest of them leaves to one access.
template <class... T>
constexpr int pack_size() {
  size_t widest = 1;
  for (const size_t size : {sizeof(T)...}) widest = size > widest ? size : widest;
  return static_cast<int>(ACCESS_BYTES / widest);
}

// Pack number `index` of an array that is aligned to a whole one.
template <int COUNT, class T>
__device__ __forceinline__ Pack<T, COUNT> load_pack(const T* array, int index) {
  return reinterpret_cast<const Pack<T, COUNT>*>(array)[index];
}
template <int COUNT, class T>
__device__ __forceinline__ void store_pack(T* array, int index, const Pack<T, COUNT>& pack) {
  reinterpret_cast<Pack<T, COUNT>*>(array)[index] = pack;
}

template <class... T>
__device__ __forceinline__ bool are_aligned(const T*... arrays) {
  return ((reinterpret_cast<uintptr_t>(arrays) | ...) & (ACCESS_BYTES - 1)) == 0;
}

// Elements of 16 bits are taken and made by twos (pairs.h).
__device__ __forceinline__ float number_of(float x) { return x; }
__device__ __forceinline__ float number_of(BFloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ __forceinline__ float number_of(Half x) { return float_of_half(x.bits); }

template <class T, int COUNT>
__device__ __forceinline__ void numbers_of(const Pack<T, COUNT>& pack, float (&numbers)[COUNT]) {
  if constexpr (sizeof(T) != sizeof(uint16_t) || COUNT == 1) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) numbers[i] = number_of(pack.elements[i]);
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; i += 2) {
      uint32_t word;
      memcpy(&word, pack.elements + i, sizeof word);
      numbers[i] = number_of(T{static_cast<uint16_t>(word)});
      numbers[i + 1] = number_of(T{static_cast<uint16_t>(word >> 16)});
    }
  }
}

template <class T, int COUNT>
__device__ __forceinline__ Pack<T, COUNT> rounded_pack(const float (&numbers)[COUNT]) {
  Pack<T, COUNT> pack;
  if constexpr (sizeof(T) != sizeof(uint16_t)) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) pack.elements[i] = numbers[i];
  } else if constexpr (COUNT == 1) {
    pack.elements[0].bits = static_cast<uint16_t>(rounded_pair(numbers[0], 0.0f, T{}));
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; i += 2) {
      const uint32_t word = rounded_pair(numbers[i], numbers[i + 1], T{});
      memcpy(pack.elements + i, &word, sizeof word);
    }
  }
  return pack;
}

}  // namespace dalle::cuda
