// Helpers of the CUDA kernels: launch geometry and errors.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace dalle::cuda {

// nullptr, or CUDA's sentence about the launch that came before.
inline const char* launch_status() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

inline const char* status(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

// Why the current device cannot run this library's kernels (there is no device, or it is none of those that the library
// was compiled for), or nullptr.
const char* device_status();

// Blocks for a grid-stride loop: enough to fill any GPU several times over, and no more.
inline unsigned grid_size(int64_t work, int threads) {
  constexpr int64_t MOST = 8192;
  const int64_t blocks = (work + threads - 1) / threads;
  return static_cast<unsigned>(blocks < 1 ? 1 : blocks < MOST ? blocks : MOST);
}

}  // namespace dalle::cuda
