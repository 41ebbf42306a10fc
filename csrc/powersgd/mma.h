// Products of small matrices in float64 on the tensor cores.
#pragma once

#include <cuda_runtime.h>

namespace dalle::cuda {

// c += a b for a [16, 8] and b [8, 8] in the layout of mma.m16n8k8: a thread with group = lane / 4 and place = lane % 4
// has a[group + 8 i][place + 4 j] at 2 j + i, b[place + 4 j][group] at j and c[group + 8 i][2 place + j] at 2 i + j.
__device__ inline void multiply_add(double (&c)[4], const double (&a)[4], const double (&b)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm("mma.sync.aligned.m16n8k8.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+d"(c[0]), "+d"(c[1]), "+d"(c[2]), "+d"(c[3])
      : "d"(a[0]), "d"(a[1]), "d"(a[2]), "d"(a[3]), "d"(b[0]), "d"(b[1]));
#elif defined(__CUDA_ARCH__)
#pragma unroll
  for (int j = 0; j < 2; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
          : "+d"(c[2 * i]), "+d"(c[2 * i + 1])
          : "d"(a[2 * j + i]), "d"(b[j]));
    }
  }
#else
  // A C++ compiler, for the tests that run kernels on a CPU.
  const int lane = threadIdx.x % 32, group = lane / 4, place = lane % 4;
  for (int k = 0; k < 8; ++k) {
    for (int i = 0; i < 2; ++i) {
      const double x = __shfl_sync(0xffffffffu, a[2 * (k / 4) + i], group * 4 + k % 4);
      for (int j = 0; j < 2; ++j) {
        c[2 * i + j] += x * __shfl_sync(0xffffffffu, b[k / 4], (2 * place + j) * 4 + k % 4);
      }
    }
  }
#endif
}

}  // namespace dalle::cuda
