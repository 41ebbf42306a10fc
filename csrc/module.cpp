// The Python module dalle_kernels._cpu: addresses, sizes and strides in, status out (as an exception).
//
// Its kernels come from csrc/<family>/bindings.cpp; here is only what concerns the library as a whole.
#include "common/isa.h"
#include "common/module.h"
#include "common/parallel.h"

using namespace dalle;

namespace {

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

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.def("instruction_sets_built", [] { return instruction_sets(false); });
  m.def("instruction_sets_available", [] { return instruction_sets(true); });
  m.def("instruction_set_used", [] { return isa_name(isa_used()); });
  m.def("force_instruction_set", &force_instruction_set, py::arg("name"));
  m.def("has_openmp", &has_openmp);
  for (const Bindings* family = Bindings::first(); family != nullptr; family = family->next) family->define(m);
}
