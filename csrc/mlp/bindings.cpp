#include "common/module.h"
#include "mlp/mlp.h"

using namespace dalle;
using namespace pybind11::literals;

DALLE_BINDINGS(mlp, m) {
  m.def(
      "bias_gelu",
      [](int dtype, int64_t width, int64_t rows, uintptr_t hidden, uintptr_t bias, uintptr_t out, uintptr_t executor) {
        const BiasGelu params{Dtype{dtype},       width, rows, pointer<const void>(hidden), pointer<const void>(bias),
                              pointer<void>(out), threads_of(executor)};
        DALLE_RUN(bias_gelu, params, executor);
      },
      "dtype"_a, "width"_a, "rows"_a, "hidden"_a, "bias"_a, "out"_a, "executor"_a);
  m.def(
      "bias_gelu_backward",
      [](int dtype, int64_t width, int64_t rows, uintptr_t hidden, uintptr_t bias, uintptr_t gradient,
         uintptr_t activation, uintptr_t bias_gradient, uintptr_t executor) {
        const BiasGeluBackward params{Dtype{dtype},
                                      width,
                                      rows,
                                      pointer<const void>(hidden),
                                      pointer<const void>(bias),
                                      pointer<void>(gradient),
                                      pointer<void>(activation),
                                      pointer<void>(bias_gradient),
                                      threads_of(executor)};
        DALLE_RUN(bias_gelu_backward, params, executor);
      },
      "dtype"_a, "width"_a, "rows"_a, "hidden"_a, "bias"_a, "gradient"_a, "activation"_a, "bias_gradient"_a,
      "executor"_a);
}
