// Stochastic rounding to 16 bits, as dalle_kernels/adamw/reference.py defines it.
#pragma once

#include "common/philox.h"

namespace dalle::DALLE_ISA_NAMESPACE {

constexpr uint32_t PHILOX_USE_ROUNDING = 1;

// words[c], of dalle_kernels/philox.py, of COUNT columns from `first` on, a multiple of 4, in one row. The loops over
// counters are for the compiler to take several at once.
template <int COUNT>
DALLE_INLINE void philox_words(uint64_t seed, uint64_t row, int64_t first, uint32_t use, uint32_t (&words)[COUNT]) {
  constexpr int counters = COUNT / PHILOX_WORDS;
  uint32_t key[2] = {low_word(seed), high_word(seed)}, x[PHILOX_WORDS][counters];
  for (int i = 0; i < counters; ++i) {
    x[0][i] = static_cast<uint32_t>(first / PHILOX_WORDS) + static_cast<uint32_t>(i);
    x[1][i] = low_word(row);
    x[2][i] = high_word(row);
    x[3][i] = use;
  }
  for (int round = 0; round < PHILOX_ROUNDS; ++round) {
    for (int i = 0; i < counters; ++i) {
      const uint64_t product0 = uint64_t{PHILOX_MULTIPLIER[0]} * x[0][i];
      const uint64_t product1 = uint64_t{PHILOX_MULTIPLIER[1]} * x[2][i];
      x[0][i] = high_word(product1) ^ x[1][i] ^ key[0];
      x[1][i] = low_word(product1);
      x[2][i] = high_word(product0) ^ x[3][i] ^ key[1];
      x[3][i] = low_word(product0);
    }
    for (int i = 0; i < 2; ++i) key[i] += PHILOX_KEY_STEP[i];
  }
  for (int c = 0; c < COUNT; ++c) words[c] = x[c % PHILOX_WORDS][c / PHILOX_WORDS];
}

// x as the neighbour towards 0, or the one away from it where word * 2^-32 is below x's place between them. Finite
// numbers stay finite; infinities and NaN stay.
template <class T>
DALLE_INLINE T rounded_stochastically(float x, uint32_t word) {
  T nearest;
  from_float(x, nearest);
  // One less in its bits is one step towards 0.
  const bool is_away = __builtin_fabsf(to_float(nearest)) > __builtin_fabsf(x);
  const T towards{static_cast<uint16_t>(nearest.bits - is_away)}, away{static_cast<uint16_t>(towards.bits + 1)};
  const double low = to_float(towards), high = to_float(away);
  return word * 0x1p-32 < (x - low) / (high - low) ? away : towards;
}

}  // namespace dalle::DALLE_ISA_NAMESPACE
