// Products of one warp's registers (mma.sync, sm_80 and later), and packs of eight 16-bit numbers.
//
// Thread t of a warp is (row, lane) = (t / 4, t % 4). It has of the left operand, [16, 16], the pairs of columns
// 2 * lane and 2 * lane + 8 of rows `row` and `row` + 8, in the order of `left`; of the right one, [16, 8], the pairs of
// rows 2 * lane and 2 * lane + 8 of column `row`; of the sums, [16, 8], columns 2 * lane and the next of rows `row`
// (0 and 1) and `row` + 8 (2 and 3).
//
// A sum does not mind the order of its terms. So where both operands lie in memory row by row, 16 bytes of a row are a
// thread's part of two products, as long as it takes the same ones of both: pairs 0 and 1, then 2 and 3.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/dtype.h"

namespace dalle::cuda {

struct alignas(16) Pack {
  uint32_t pairs[4];
};

// sums += left . right
template <class Element>
__device__ __forceinline__ void multiply_add(float (&sums)[4], uint32_t left0, uint32_t left1, uint32_t left2,
                                             uint32_t left3, uint32_t right0, uint32_t right1);

#define DALLE_MMA(ELEMENT, TYPE)                                                                                     \
  template <>                                                                                                        \
  __device__ __forceinline__ void multiply_add<ELEMENT>(float (&sums)[4], uint32_t left0, uint32_t left1,            \
                                                        uint32_t left2, uint32_t left3, uint32_t right0,             \
                                                        uint32_t right1) {                                           \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, " \
        "{%0, %1, %2, %3};"                                                                                          \
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                                                 \
        : "r"(left0), "r"(left1), "r"(left2), "r"(left3), "r"(right0), "r"(right1));                                 \
  }
DALLE_MMA(BFloat16, "bf16")
DALLE_MMA(Half, "f16")
#undef DALLE_MMA

// The two numbers of a pair, and the pair of two numbers, each rounded to nearest.
__device__ __forceinline__ void unpack(uint32_t pair, float& first, float& second, BFloat16) {
  first = __uint_as_float(pair << 16), second = __uint_as_float(pair & 0xffff0000u);
}
__device__ __forceinline__ void unpack(uint32_t pair, float& first, float& second, Half) {
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}"
      : "=f"(first), "=f"(second)
      : "r"(pair));
}
__device__ __forceinline__ uint32_t pack(float first, float second, BFloat16) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}
__device__ __forceinline__ uint32_t pack(float first, float second, Half) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

// Number WHICH of each of two pairs, as a pair.
template <int WHICH>
__device__ __forceinline__ uint32_t pair_of(uint32_t first, uint32_t second) {
  return __byte_perm(first, second, WHICH == 0 ? 0x5410 : 0x7632);
}

}  // namespace dalle::cuda
