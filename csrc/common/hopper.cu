#include "common/hopper.h"

#include "common/cuda.h"

namespace dalle::cuda {

const char* hopper_status() {
#if defined(DALLE_BUILT_90A)
  const int major = device_attribute(cudaDevAttrComputeCapabilityMajor);
  const int minor = device_attribute(cudaDevAttrComputeCapabilityMinor);
  if (major != 9 || minor != 0) return "the kernel is made for Hopper GPUs, compute capability 9.0";
  return nullptr;
#else
  return "the library was compiled without the kernels for Hopper GPUs; DALLE_KERNELS_CUDA_ARCHITECTURES must list "
         "90a, and not 90 beside it";
#endif
}

}  // namespace dalle::cuda
