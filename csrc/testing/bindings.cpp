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
  m.def(
      "uniform_noise",
      [](int64_t seed, int64_t offset, int64_t columns, int64_t rows, uintptr_t v) {
        const UniformNoise params{static_cast<uint64_t>(seed), static_cast<uint64_t>(offset), columns, rows,
                                  pointer<float>(v)};
        DALLE_RUN(uniform_noise, params, );
      },
      "seed"_a, "offset"_a, "columns"_a, "rows"_a, "v"_a);
}
