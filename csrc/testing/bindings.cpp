#include "testing/testing.h"

#include "common/module.h"

using namespace dalle;
using namespace pybind11::literals;

DALLE_BINDINGS(m) {
  m.def(
      "elementwise",
      [](int function, uintptr_t input, uintptr_t output, int64_t count, uintptr_t) {
        const Elementwise params{ElementwiseFunction{function}, pointer<const float>(input), pointer<float>(output),
                                 count};
        DALLE_RUN(elementwise, params, );
      },
      "function"_a, "input"_a, "output"_a, "count"_a, "executor"_a);
}
