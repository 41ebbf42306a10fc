// Many tensors in one launch of a CUDA kernel: where they lie travels as a parameter of the kernel, so nothing has to
// be copied before it, nothing outlives it, and a captured graph holds all of it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace dalle::cuda {

constexpr int MOST_PARAMETER_BYTES = 4096;  // of a kernel, on every GPU and by every CUDA

// Tensors one after another, each cut into tiles of its own, of which the last may be a part. Those without elements
// are left out.
template <class Tensor>
struct TensorTable {
  // Half a kilobyte is for the kernel's other parameters.
  static constexpr int MOST = (MOST_PARAMETER_BYTES - 512) / (sizeof(Tensor) + sizeof(int64_t));

  int tensors = 0;
  int64_t first_tile[MOST + 1] = {0};  // of each tensor, and behind the last one
  Tensor tensor[MOST];

  __device__ __forceinline__ int owner(int64_t tile) const {
    int low = 0, high = tensors;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (first_tile[middle] <= tile) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }
};

// Calls launch(table, tiles) for as many tables as it takes to hold the tensors `tensor_of(0)` to
// `tensor_of(tensor_count - 1)`, which have a `count` each; returns the first error.
template <class Tensor, class TensorOf, class Launch>
const char* for_each_table(int64_t tensor_count, int64_t tile_elements, const TensorOf& tensor_of,
                           const Launch& launch) {
  TensorTable<Tensor> table;
  const char* error = nullptr;
  for (int64_t t = 0; t < tensor_count && error == nullptr; ++t) {
    const Tensor tensor = tensor_of(t);
    if (tensor.count != 0) {
      const int64_t tiles = (tensor.count + tile_elements - 1) / tile_elements;
      table.tensor[table.tensors] = tensor;
      table.first_tile[table.tensors + 1] = table.first_tile[table.tensors] + tiles;
      ++table.tensors;
    }
    if (table.tensors == TensorTable<Tensor>::MOST || (t + 1 == tensor_count && table.tensors != 0)) {
      error = launch(table, static_cast<unsigned>(table.first_tile[table.tensors]));
      table.tensors = 0;
    }
  }
  return error;
}

}  // namespace dalle::cuda
