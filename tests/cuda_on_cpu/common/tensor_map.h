// Stands for csrc/common/tensor_map.h: no driver is asked.
#pragma once

#include <cuda.h>

#include <algorithm>

#include "common/hopper_layout.h"

namespace dalle::cuda {

struct BoxedTensor {
  const void* data;
  uint64_t sizes[5];
  uint64_t strides[4];
  uint32_t box[5];
};

inline const char* make_tensor_map(const BoxedTensor& tensor, bool, CUtensorMap& map) {
  map.data = tensor.data;
  std::copy_n(tensor.sizes, 5, map.sizes);
  std::copy_n(tensor.strides, 4, map.strides);
  std::copy_n(tensor.box, 5, map.box);
  return nullptr;
}

}  // namespace dalle::cuda
