// How the blocks of one cooperative launch wait for each other and exchange numbers. Each row of its grid has a matrix
// of its own.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/cuda.h"

namespace dalle::cuda {

// Every block of a row of the grid arrives, and sees what the others wrote before. `arrived` starts as 0; `barriers`
// counts those passed and is the same in all threads.
__device__ inline void grid_barrier(unsigned* arrived, unsigned& barriers) {
  ++barriers;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(arrived, 1u);
    while (*static_cast<volatile unsigned*>(arrived) < barriers * gridDim.x) __nanosleep(20);
    __threadfence();
  }
  __syncthreads();
}

// A number and the step it belongs to go as one word, which a reader waits for: no barrier is needed.
__device__ inline void post(uint64_t* box, float value, unsigned step) {
  *static_cast<volatile uint64_t*>(box) = static_cast<uint64_t>(step) << 32 | __float_as_uint(value);
}

// Looks into a box; whether the step's number has come.
__device__ inline bool receive(const uint64_t* box, unsigned step, float& value) {
  const uint64_t word = *static_cast<const volatile uint64_t*>(box);
  value = __uint_as_float(static_cast<unsigned>(word));
  return static_cast<unsigned>(word >> 32) == step;
}

// How many blocks of a cooperative launch the device holds at once.
template <class Kernel>
cudaError_t blocks_at_once(Kernel* kernel, int threads, int& blocks) {
  int device = 0, processors = 0, each = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, 0);
  blocks = processors * each;
  return error;
}

// Launches the kernel for all matrices, with `most` blocks for each or as many as there are; as many matrices at a time
// as the device then holds at once, from params.first on.
template <class Params>
const char* launch_cooperatively(void (*kernel)(Params), Params params, int most, int threads, cudaStream_t stream) {
  int blocks = 0;
  cudaError_t error = blocks_at_once(kernel, threads, blocks);
  if (error != cudaSuccess) return status(error);
  if (blocks == 0) return "the device holds no block of this kernel";
  const int each = most < blocks ? most : blocks, together = blocks / each;
  for (params.first = 0; params.first < params.matrices; params.first += together) {
    const int left = params.matrices - params.first;
    void* arguments[] = {&params};
    error = cudaLaunchCooperativeKernel(kernel, dim3(each, left < together ? left : together), dim3(threads), arguments,
                                        0, stream);
    if (error != cudaSuccess) break;
  }
  return status(error);
}

}  // namespace dalle::cuda
