// Tensor maps, which tell Hopper's copy engine where a tensor lies. The driver makes them; its function is looked up
// when first needed, so that the library loads where there is no driver.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "common/cuda.h"
#include "common/hopper_layout.h"

namespace dalle::cuda {

using EncodeTensorMap = decltype(&cuTensorMapEncodeTiled);

// The driver's function, or nullptr.
inline EncodeTensorMap encode_tensor_map() {
  static const EncodeTensorMap function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    return reinterpret_cast<EncodeTensorMap>(result == cudaDriverEntryPointSuccess ? found : nullptr);
  }();
  return function;
}

// A tensor of 16-bit numbers in five dimensions, the innermost first: sizes, strides in bytes of all but the first, and
// the box that one copy takes, whose rows are those of a tile (hopper_layout.h).
struct BoxedTensor {
  const void* data;
  uint64_t sizes[5];
  uint64_t strides[4];
  uint32_t box[5];
};

// The copy engine wants strides of at least 16 bytes also where a dimension has one element.
inline const char* make_tensor_map(const BoxedTensor& tensor, bool bfloat16, CUtensorMap& map) {
  const EncodeTensorMap encode = encode_tensor_map();
  if (encode == nullptr) return "the driver knows no tensor maps; CUDA 12 brings them";
  const uint32_t steps[5] = {1, 1, 1, 1, 1};
  const CUresult result = encode(
      &map, bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 5,
      const_cast<void*>(tensor.data), tensor.sizes, tensor.strides, tensor.box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "the driver refused a tensor map";
}

}  // namespace dalle::cuda
