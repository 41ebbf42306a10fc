// Helpers of the CUDA kernels: launches, their geometry and errors.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace dalle::cuda {

// nullptr, or CUDA's sentence about the error, which no later call shall find.
inline const char* status(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

// Launches a kernel that needs no more shared memory than it declares. Unlike <<< >>> this is C++, which the tests'
// compiler for the CPU reads too.
template <class... Params>
const char* launch(void (*kernel)(Params...), dim3 blocks, int threads, cudaStream_t stream,
                   const std::common_type_t<Params>&... params) {
  void* arguments[] = {const_cast<std::remove_const_t<Params>*>(&params)...};
  return status(cudaLaunchKernel(kernel, blocks, dim3(threads), arguments, 0, stream));
}

// Why the current device cannot run this library's kernels (there is no device, or it is none of those that the library
// was compiled for), or nullptr.
const char* device_status();

// The architecture that the kernels which run on the current device were compiled for, as 10 * major + minor: it says
// what is in them. The device's own may be later, for which the driver has translated them. 0 where none of them runs.
int code_architecture();

// An attribute of the current device, or 0 where it tells none.
int device_attribute(cudaDeviceAttr attribute);

// How many bytes of shared memory a block of the current device may have at most, once it asks for them.
inline int most_shared() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

// Launches a kernel that may start, where `chained` and its code can, once all blocks of the kernel before have started
// (await_last_kernel in common/ahead.h).
template <class Params>
const char* launch_chained(void (*kernel)(Params), const Params& params, dim3 blocks, int threads, size_t shared,
                           bool chained, cudaStream_t stream) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t launch{};
  launch.gridDim = blocks, launch.blockDim = dim3(threads), launch.dynamicSmemBytes = shared, launch.stream = stream;
  launch.attrs = &attribute, launch.numAttrs = chained && code_architecture() >= 90;
  return status(cudaLaunchKernelEx(&launch, kernel, params));
}

// Blocks for a grid-stride loop: enough to fill any GPU several times over, and no more.
inline unsigned grid_size(int64_t work, int threads) {
  constexpr int64_t MOST = 8192;
  const int64_t blocks = (work + threads - 1) / threads;
  return static_cast<unsigned>(blocks < 1 ? 1 : blocks < MOST ? blocks : MOST);
}

}  // namespace dalle::cuda
