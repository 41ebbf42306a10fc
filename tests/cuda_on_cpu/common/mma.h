// Stands for csrc/common/mma.h, whose contracts these functions keep: products of a warp's registers on a CPU.
#pragma once

#include <cuda_runtime.h>

#include "common/pairs.h"

namespace dalle::cuda {

struct Operands {
  uint32_t left[4], right[2];
};

template <class Element>
void multiply_add(float (&sums)[4], uint32_t left0, uint32_t left1, uint32_t left2, uint32_t left3, uint32_t right0,
                  uint32_t right1) {
  static thread_local Operands shown[1024];  // of a block, which is a thread of the system
  const int me = on_cpu::block->running, row = me % 32 / 4, lane = me % 4;
  Operands* const warp = shown + me / 32 * 32;
  shown[me] = {{left0, left1, left2, left3}, {right0, right1}};
  on_cpu::meet_warp();
  for (int i = 0; i < 4; ++i) {
    for (int k = 0; k < 16; k += 2) {
      const Operands& left = warp[row * 4 + k % 8 / 2];
      const Operands& right = warp[(2 * lane + i % 2) * 4 + k % 8 / 2];
      const float2 a = numbers_of(left.left[k / 8 * 2 + i / 2], Element{});
      const float2 b = numbers_of(right.right[k / 8], Element{});
      sums[i] += a.x * b.x;
      sums[i] += a.y * b.y;
    }
  }
  on_cpu::meet_warp();
}

}  // namespace dalle::cuda
