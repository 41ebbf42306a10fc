// What a family's bindings.cpp is made of: a place in the Python module, Python's arguments turned into parameter
// structs, and statuses into exceptions.
//
// The same bindings.cpp is compiled into dalle_kernels._cpu and, where the family has a .cu file, into
// dalle_kernels._cuda with DALLE_MODULE_CUDA defined. A function's last argument, `executor`, is the number of threads
// there and the CUDA stream here. Nothing in these files checks tensors: dalle_kernels/<family>/ops.py does, and alone
// calls these functions.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/isa.h"
#include "common/strided.h"
#include "common/tensor.h"

namespace dalle {

namespace py = pybind11;

// One family's part of the Python module; all of them are in a list that the module's start goes through.
struct Bindings {
  using Define = void (*)(py::module_&);
  Define define;
  Bindings* next;
  explicit Bindings(Define define_) : define(define_), next(first()) { first() = this; }
  static Bindings*& first() {
    static Bindings* list = nullptr;
    return list;
  }
};

// DALLE_BINDINGS(family, m) { m.def(...); }
#define DALLE_BINDINGS(family, m)                            \
  static void define_##family(::pybind11::module_&);           \
  static ::dalle::Bindings family##_bindings(&define_##family); \
  static void define_##family(::pybind11::module_& m)

// Addresses come as integers (torch's data_ptr()).
template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline Strided strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  if (sizes.size() != strides.size() || sizes.size() > static_cast<size_t>(Strided::MAX_DIMS)) {
    throw std::invalid_argument("expected as many sizes as strides, at most " + std::to_string(Strided::MAX_DIMS) +
                                ", got " + std::to_string(sizes.size()) + " and " + std::to_string(strides.size()));
  }
  Strided shape{static_cast<int>(sizes.size()), {}, {}};
  for (size_t d = 0; d < sizes.size(); ++d) {
    shape.sizes[d] = sizes[d];
    shape.strides[d] = strides[d];
  }
  return shape;
}

inline void check(const char* kernel, const char* status) {
  if (status != nullptr) throw std::runtime_error(std::string(kernel) + ": " + status);
}

// What a parameter struct's `threads` gets, between 1 and a number that no machine's cores exceed; kernels on CUDA do
// not read it.
inline int threads_of(uintptr_t executor) {
#if defined(DALLE_MODULE_CUDA)
  (void)executor;
  return 1;
#else
  constexpr uintptr_t MOST = 1024;
  return executor == 0 ? 1 : static_cast<int>(executor < MOST ? executor : MOST);
#endif
}

}  // namespace dalle

// Runs a kernel without Python's lock: on CUDA on the stream, on the CPU in the build that fits this processor.
#if defined(DALLE_MODULE_CUDA)
#define DALLE_RUN(name, params, executor)                                              \
  do {                                                                                 \
    const ::pybind11::gil_scoped_release unlocked;                                     \
    ::dalle::check(#name, ::dalle::cuda::name(params, ::dalle::pointer<void>(executor))); \
  } while (false)
#else
#define DALLE_RUN(name, params, executor)                 \
  do {                                                    \
    const ::pybind11::gil_scoped_release unlocked;        \
    ::dalle::check(#name, DALLE_CPU_KERNEL(name)(params)); \
  } while (false)
#endif
