// Stands for csrc/common/mma.h, whose contracts these functions keep: products of a warp's registers on a CPU.
#pragma once

#include <cuda_runtime.h>

#include "common/dtype.h"

namespace dalle::cuda {

using plain::from_float, plain::to_float;

struct alignas(16) Pack {
  uint32_t pairs[4];
};

struct Operands {
  uint32_t left[4], right[2];
};

template <class Element>
float number_of(uint32_t pair, int which) {
  return to_float(Element{static_cast<uint16_t>(pair >> 16 * which)});
}

template <class Element>
void multiply_add(float (&sums)[4], uint32_t left0, uint32_t left1, uint32_t left2, uint32_t left3, uint32_t right0,
                  uint32_t right1) {
  static thread_local Operands shown[1024];  // of a block, which is a thread of the system
  const int me = on_cpu::block->running, row = me % 32 / 4, lane = me % 4;
  Operands* const warp = shown + me / 32 * 32;
  shown[me] = {{left0, left1, left2, left3}, {right0, right1}};
  on_cpu::meet_warp();
  for (int i = 0; i < 4; ++i) {
    for (int k = 0; k < 16; ++k) {
      const Operands& left = warp[row * 4 + k % 8 / 2];
      const Operands& right = warp[(2 * lane + i % 2) * 4 + k % 8 / 2];
      sums[i] += number_of<Element>(left.left[k / 8 * 2 + i / 2], k % 2) * number_of<Element>(right.right[k / 8], k % 2);
    }
  }
  on_cpu::meet_warp();
}

template <class Element>
void unpack(uint32_t pair, float& first, float& second, Element) {
  first = number_of<Element>(pair, 0), second = number_of<Element>(pair, 1);
}
template <class Element>
uint32_t pack(float first, float second, Element) {
  Element low, high;
  from_float(first, low), from_float(second, high);
  return low.bits | static_cast<uint32_t>(high.bits) << 16;
}
template <int WHICH>
uint32_t pair_of(uint32_t first, uint32_t second) {
  return (first >> 16 * WHICH & 0xffff) | second >> 16 * WHICH << 16;
}

}  // namespace dalle::cuda
