#include "common/cuda.h"
#include "common/hopper.h"

namespace dalle::cuda {
namespace {

__global__ void nothing() {}

}  // namespace

const char* device_status() {
  cudaFuncAttributes attributes;
  const char* found = status(cudaFuncGetAttributes(&attributes, nothing));
  cudaGetLastError();  // reported here; no later launch shall find it
  return found;
}

const char* hopper_status() {
  int device = 0, major = 0, minor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (major != 9 || minor != 0) return "the kernel is made for Hopper GPUs, compute capability 9.0";
  return nullptr;
}

}  // namespace dalle::cuda
