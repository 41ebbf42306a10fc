#include "common/tensor.h"

#include <algorithm>

#include "common/module.h"

using namespace pybind11::literals;

namespace dalle {
namespace {

// DLPack 1.3, as far as it is used here. Its major number tells the layout.
constexpr uint32_t EXCHANGE_MAJOR = 1;

struct View {
  void* data;
  int32_t device_type, device_index;
  int32_t dims;
  uint8_t kind, bits;
  uint16_t lanes;
  int64_t *sizes, *strides;
  uint64_t byte_offset;
};

struct Exchange {
  uint32_t major, minor;
  const void* previous;
  void (*allocate)(), (*share)(), (*take)();
  int (*view)(void* tensor, View* view);  // 0, or -1 with an exception set
};

const Exchange* exchange = nullptr;
PyTypeObject *tensor_type = nullptr, *parameter_type = nullptr;

// Number types that no kernel takes as such (a target's int64, a mask) have a number of their own.
Dtype dtype_of(const View& view) {
  constexpr uint8_t FLOAT = 2, BFLOAT = 4;
  if (view.kind == BFLOAT) return Dtype::bfloat16;
  if (view.kind != FLOAT) return Dtype{-1};
  return view.bits == 16 ? Dtype::float16 : view.bits == 32 ? Dtype::float32 : Dtype::float64;
}

void exchange_tensors(const py::type& tensor, const py::type& parameter, const py::capsule& table) {
  const auto* const given = static_cast<const Exchange*>(PyCapsule_GetPointer(table.ptr(), "dlpack_exchange_api"));
  if (given == nullptr) throw py::error_already_set();
  if (given->major != EXCHANGE_MAJOR || given->view == nullptr) {
    throw std::invalid_argument("expected DLPack's C exchange interface of version 1, got version " +
                                std::to_string(given->major));
  }
  exchange = given;
  tensor_type = reinterpret_cast<PyTypeObject*>(tensor.ptr());
  parameter_type = reinterpret_cast<PyTypeObject*>(parameter.ptr());
}

template <class T>
void append(std::string& bytes, const T* numbers, int64_t count = 1) {
  bytes.append(reinterpret_cast<const char*>(numbers), count * sizeof(T));
}

// Appends how a tensor looks, and tells whether it is nothing more than memory of the CPU. Symbolic zeros have no
// memory; of what remains, only the values of negative views are made by torch's dispatcher.
bool append_plain(py::handle source, std::string& bytes) {
  constexpr int32_t CPU = 1;
  static PyObject* const is_neg = PyUnicode_InternFromString("is_neg");
  View view;
  if (Py_TYPE(source.ptr()) != tensor_type && Py_TYPE(source.ptr()) != parameter_type) return false;
  if (exchange->view(source.ptr(), &view) != 0) return PyErr_Clear(), false;
  const bool empty = std::count(view.sizes, view.sizes + view.dims, 0) != 0;
  if (view.device_type != CPU || (view.data == nullptr && !empty)) return false;
  const auto negative = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(source.ptr(), is_neg));
  if (!negative) throw py::error_already_set();
  append(bytes, &view.dims);
  append(bytes, &view.kind);
  append(bytes, &view.bits);
  append(bytes, view.sizes, view.dims);
  append(bytes, view.strides, view.dims);
  return negative.ptr() == Py_False;
}

py::object signature(const py::tuple& tensors, const py::tuple& settings) {
  std::string bytes;
  for (const py::handle tensor : tensors) {
    const bool absent = tensor.is_none();
    append(bytes, &absent);
    if (!absent && !append_plain(tensor, bytes)) return py::none();
  }
  for (const py::handle setting : settings) {
    const PyTypeObject* const type = Py_TYPE(setting.ptr());
    append(bytes, &type);
  }
  return py::bytes(bytes);
}

}  // namespace

bool read_tensor(py::handle source, Tensor& tensor) {
  if (source.is_none()) {
    tensor.data = nullptr, tensor.dims = 0;
    return true;
  }
  View view;
  if (exchange == nullptr || !PyObject_TypeCheck(source.ptr(), tensor_type)) return false;
  if (exchange->view(source.ptr(), &view) != 0) throw py::error_already_set();
  if (view.dims > Tensor::MAX_DIMS) {
    throw std::invalid_argument("expected at most " + std::to_string(Tensor::MAX_DIMS) + " dimensions, got " +
                                std::to_string(view.dims));
  }
  tensor.data = static_cast<char*>(view.data) + view.byte_offset;
  tensor.dtype = dtype_of(view);
  tensor.dims = view.dims;
  std::copy_n(view.sizes, view.dims, tensor.sizes);
  std::copy_n(view.strides, view.dims, tensor.strides);
  return true;
}

}  // namespace dalle

DALLE_BINDINGS(tensor, m) {
  m.def("exchange_tensors", &dalle::exchange_tensors, "tensor"_a, "parameter"_a, "table"_a,
        "Take torch's classes and its table of DLPack functions; before any function that takes a tensor.");
  m.def("signature", &dalle::signature, "tensors"_a, "settings"_a,
        "Dtypes, sizes and strides of the tensors (or None among them) and types of the settings, as bytes; None where "
        "one of the tensors is more than memory of the CPU.");
}
