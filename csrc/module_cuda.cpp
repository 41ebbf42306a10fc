// The Python module dalle_kernels._cuda: as dalle_kernels._cpu, with a CUDA stream in place of a number of threads.
//
// The device that is current when a function is called is the one used; dalle_kernels/_native.py sees to it.
#include <cuda_runtime_api.h>

#include "common/cuda.h"
#include "common/module.h"

using namespace dalle;

namespace {

int runtime_version() {
  int version = 0;
  cudaRuntimeGetVersion(&version);
  return version;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.def("runtime_version", &runtime_version, "Of the CUDA runtime inside this library, as 1000 * major + 10 * minor.");
  m.def("device_status", &cuda::device_status, "Why the current device cannot run these kernels, or None.");
  for (const Bindings* family = Bindings::first(); family != nullptr; family = family->next) family->define(m);
}
