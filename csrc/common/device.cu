#include "common/cuda.h"

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

}  // namespace dalle::cuda
