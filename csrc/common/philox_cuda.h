// Philox4x32-10 as dalle_kernels/philox.py defines it, one counter a call. CUDA only.
//
// Cost: 10 instructions a word.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/instructions.h"

namespace dalle::cuda {

constexpr int PHILOX_WORDS = 4;
constexpr uint32_t PHILOX_USE_GUMBEL = 0, PHILOX_USE_ROUNDING = 1;

// The noise of one row.
class PhiloxRow {
 public:
  __device__ __forceinline__ PhiloxRow(uint64_t seed, uint64_t row, uint32_t use)
      : key_{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)},
        row_{static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32)},
        use_(use) {}

  // The words of the columns 4 * group to 4 * group + 3, each XORed with FLIP, which costs nothing.
  template <uint32_t FLIP = 0>
  __device__ __forceinline__ void words(uint32_t group, uint32_t (&x)[PHILOX_WORDS]) const {
    constexpr int ROUNDS = 10;
    x[0] = group, x[1] = row_[0], x[2] = row_[1], x[3] = use_;
    uint32_t key0 = key_[0], key1 = key_[1];
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
      uint32_t low0, high0, low1, high1;
      multiply_wide(x[0], 0xD2511F53u, low0, high0);
      multiply_wide(x[2], 0xCD9E8D57u, low1, high1);
      const uint32_t flip = round + 1 < ROUNDS ? 0 : FLIP;
      x[0] = high1 ^ x[1] ^ (key0 ^ flip);
      x[2] = high0 ^ x[3] ^ (key1 ^ flip);
      x[1] = low1 ^ flip;
      x[3] = low0 ^ flip;
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
  }

 private:
  uint32_t key_[2], row_[2], use_;
};

}  // namespace dalle::cuda
