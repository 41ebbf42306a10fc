// Products of one warp's registers (mma.sync, sm_80 and later).
//
// Thread t of a warp is (row, lane) = (t / 4, t % 4). It has of the left operand, [16, 16], the pairs of columns
// 2 * lane and 2 * lane + 8 of rows `row` and `row` + 8, in the order of `left`; of the right one, [16, 8], the pairs
// of rows 2 * lane and 2 * lane + 8 of column `row`; of the sums, [16, 8], columns 2 * lane and the next of rows `row`
// (0 and 1) and `row` + 8 (2 and 3).
//
// A sum does not mind the order of its terms. So where both operands lie in memory row by row, 16 bytes of a row are a
// thread's part of two products, as long as it takes the same ones of both: pairs 0 and 1, then 2 and 3.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/dtype.h"

namespace dalle::cuda {

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

}  // namespace dalle::cuda
