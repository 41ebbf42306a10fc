// The Python module dalle_kernels._cuda: as dalle_kernels._cpu, with a CUDA stream in place of a number of threads.
//
// The device that is current when a function is called is the one used; dalle_kernels/_native.py sees to it.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include "common/cuda.h"
#include "common/module.h"
#include "float16/float16.h"

namespace py = pybind11;
using namespace dalle;

namespace {

#define RUN_CUDA_KERNEL(name, params, stream)             \
  do {                                                    \
    const py::gil_scoped_release unlocked;                \
    check(#name, cuda::name(params, pointer<void>(stream))); \
  } while (false)

void bind_float16(py::module_& m) {
  using namespace py::literals;
  m.def(
      "float16_encode",
      [](uintptr_t input, int dtype, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
         uintptr_t codes, uintptr_t nonfinite, int format, uintptr_t stream) {
        const Float16Encode params{pointer<const void>(input), Dtype{dtype},
                                   strided(sizes, strides),    pointer<uint16_t>(codes),
                                   pointer<uint8_t>(nonfinite), Float16Format{format}, 0};
        RUN_CUDA_KERNEL(float16_encode, params, stream);
      },
      "input"_a, "dtype"_a, "sizes"_a, "strides"_a, "codes"_a, "nonfinite"_a, "format"_a, "stream"_a);
  m.def(
      "float16_decode",
      [](uintptr_t codes, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, uintptr_t output,
         int dtype, int format, uintptr_t stream) {
        const Float16Decode params{pointer<const uint16_t>(codes), strided(sizes, strides), pointer<void>(output),
                                   Dtype{dtype},                   Float16Format{format},   0};
        RUN_CUDA_KERNEL(float16_decode, params, stream);
      },
      "codes"_a, "sizes"_a, "strides"_a, "output"_a, "dtype"_a, "format"_a, "stream"_a);
}

int runtime_version() {
  int version = 0;
  cudaRuntimeGetVersion(&version);
  return version;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.def("runtime_version", &runtime_version, "Of the CUDA runtime inside this library, as 1000 * major + 10 * minor.");
  m.def("device_status", &cuda::device_status, "Why the current device cannot run these kernels, or None.");
  bind_float16(m);
}
