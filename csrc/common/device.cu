#include "common/cuda.h"

namespace dalle::cuda {
namespace {

__global__ void nothing() {}

}  // namespace

const char* device_status() {
  cudaFuncAttributes attributes;
  return status(cudaFuncGetAttributes(&attributes, nothing));
}

}  // namespace dalle::cuda
