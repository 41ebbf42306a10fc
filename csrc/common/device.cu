#include <atomic>

#include "common/cuda.h"

namespace dalle::cuda {
namespace {

// Compiled for the same architectures as all kernels.
__global__ void nothing() {}

}  // namespace

const char* device_status() {
  cudaFuncAttributes attributes;
  return status(cudaFuncGetAttributes(&attributes, nothing));
}

int code_architecture() {
  constexpr int DEVICES = 64;  // whose answers are kept, for launches ask
  static std::atomic<int> known[DEVICES];
  int device = 0;
  if (status(cudaGetDevice(&device)) != nullptr) return 0;
  const int kept = device < DEVICES ? known[device].load() : 0;
  if (kept != 0) return kept;
  cudaFuncAttributes attributes{};
  if (status(cudaFuncGetAttributes(&attributes, nothing)) != nullptr) return 0;
  if (device < DEVICES) known[device] = attributes.ptxVersion;
  return attributes.ptxVersion;
}

int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  if (status(cudaGetDevice(&device)) != nullptr) return 0;
  return status(cudaDeviceGetAttribute(&value, attribute, device)) == nullptr ? value : 0;
}

}  // namespace dalle::cuda
