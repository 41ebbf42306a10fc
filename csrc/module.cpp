// The Python module dalle_kernels._cpu: addresses, sizes and strides in, status out (as an exception).
//
// Nothing here checks tensors: dalle_kernels/<family>/ops.py does, and alone calls these functions. Each releases
// Python's lock while its kernel runs.
#include <pybind11/pybind11.h>

#include "common/isa.h"
#include "common/module.h"
#include "common/parallel.h"
#include "float16/float16.h"

namespace py = pybind11;
using namespace dalle;

namespace {

// Runs the build of a kernel that fits this processor.
#define RUN_CPU_KERNEL(name, params)                          \
  do {                                                        \
    const py::gil_scoped_release unlocked;                    \
    check(#name, isa_choose(DALLE_CPU_BUILDS(name))(params)); \
  } while (false)

std::vector<std::string> instruction_sets(bool supported_only) {
  std::vector<std::string> names;
  for (int i = 0; i < ISA_COUNT; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (isa_built(isa) && (!supported_only || isa_supported(isa))) names.push_back(isa_name(isa));
  }
  return names;
}

void force_instruction_set(const std::string& name) {
  for (int i = 0; i < ISA_COUNT; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (isa_name(isa) == name && isa_built(isa) && isa_supported(isa)) return isa_force(isa);
  }
  throw std::invalid_argument("not an instruction set that is built and supported: " + name);
}

void bind_float16(py::module_& m) {
  using namespace py::literals;
  m.def(
      "float16_encode",
      [](uintptr_t input, int dtype, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
         uintptr_t codes, uintptr_t nonfinite, int format, int threads) {
        const Float16Encode params{pointer<const void>(input), Dtype{dtype},
                                   strided(sizes, strides),    pointer<uint16_t>(codes),
                                   pointer<uint8_t>(nonfinite), Float16Format{format}, threads};
        RUN_CPU_KERNEL(float16_encode, params);
      },
      "input"_a, "dtype"_a, "sizes"_a, "strides"_a, "codes"_a, "nonfinite"_a, "format"_a, "threads"_a);
  m.def(
      "float16_decode",
      [](uintptr_t codes, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, uintptr_t output,
         int dtype, int format, int threads) {
        const Float16Decode params{pointer<const uint16_t>(codes), strided(sizes, strides), pointer<void>(output),
                                   Dtype{dtype},                   Float16Format{format},   threads};
        RUN_CPU_KERNEL(float16_decode, params);
      },
      "codes"_a, "sizes"_a, "strides"_a, "output"_a, "dtype"_a, "format"_a, "threads"_a);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.def("instruction_sets_built", [] { return instruction_sets(false); });
  m.def("instruction_sets_available", [] { return instruction_sets(true); });
  m.def("instruction_set_used", [] { return isa_name(isa_used()); });
  m.def("force_instruction_set", &force_instruction_set, py::arg("name"));
  m.def("has_openmp", &has_openmp);
  bind_float16(m);
}
