#include "common/hopper.h"

#include "common/cuda.h"

namespace dalle::cuda {

const char* hopper_status() {
  const int major = device_attribute(cudaDevAttrComputeCapabilityMajor);
  const int minor = device_attribute(cudaDevAttrComputeCapabilityMinor);
  if (major != 9 || minor != 0) return "the kernel is made for Hopper GPUs, compute capability 9.0";
  return nullptr;
}

}  // namespace dalle::cuda
