#include "common/hopper.h"

namespace dalle::cuda {

const char* hopper_status() {
  int device = 0, major = 0, minor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (major != 9 || minor != 0) return "the kernel is made for Hopper GPUs, compute capability 9.0";
  return nullptr;
}

}  // namespace dalle::cuda
