// torch's tensors as arguments of a binding: where one lies, its dtype, sizes and strides.
//
// torch tells them through DLPack's C exchange interface, a table of C functions that torch.Tensor carries. So this
// library still needs no header of torch's, and to read a tensor takes 0.1 µs: its address, its strides and the dtype's
// number, each fetched in Python and turned into C++, take five times as long.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "common/dtype.h"
#include "common/strided.h"

namespace dalle {

// One that is None has no data and no dimensions. Only good until the binding returns.
struct Tensor {
  static constexpr int MAX_DIMS = Strided::MAX_DIMS + 1;  // rows of MAX_DIMS, and columns
  void* data;
  Dtype dtype;
  int dims;
  int64_t sizes[MAX_DIMS], strides[MAX_DIMS];

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
  Strided shape() const {
    Strided shape{dims < Strided::MAX_DIMS ? dims : Strided::MAX_DIMS, {}, {}};
    for (int d = 0; d < shape.dims; ++d) shape.sizes[d] = sizes[d], shape.strides[d] = strides[d];
    return shape;
  }
};

// Throws where there are more dimensions than MAX_DIMS; false for what is no tensor.
bool read_tensor(pybind11::handle source, Tensor& tensor);

}  // namespace dalle

namespace pybind11::detail {

template <>
struct type_caster<dalle::Tensor> {
  PYBIND11_TYPE_CASTER(dalle::Tensor, const_name("torch.Tensor | None"));
  bool load(handle source, bool) { return dalle::read_tensor(source, value); }
};

}  // namespace pybind11::detail
