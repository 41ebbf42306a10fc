// Stochastic rounding to 16 bits, as dalle_kernels/adamw/reference.py defines it.
#pragma once

#include "common/philox.h"

namespace dalle::DALLE_ISA_NAMESPACE {

constexpr uint32_t PHILOX_USE_ROUNDING = 1;

// The four words of dalle_kernels/philox.py for columns 4 * group .. 4 * group + 3 of one row.
DALLE_INLINE void philox_words(uint64_t seed, uint64_t row, uint32_t group, uint32_t use, uint32_t (&x)[PHILOX_WORDS]) {
  uint32_t key[2] = {low_word(seed), high_word(seed)};
  x[0] = group;
  x[1] = low_word(row);
  x[2] = high_word(row);
  x[3] = use;
  for (int round = 0; round < PHILOX_ROUNDS; ++round) {
    const uint64_t product0 = uint64_t{PHILOX_MULTIPLIER[0]} * x[0], product1 = uint64_t{PHILOX_MULTIPLIER[1]} * x[2];
    x[0] = high_word(product1) ^ x[1] ^ key[0];
    x[1] = low_word(product1);
    x[2] = high_word(product0) ^ x[3] ^ key[1];
    x[3] = low_word(product0);
    for (int i = 0; i < 2; ++i) key[i] += PHILOX_KEY_STEP[i];
  }
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
