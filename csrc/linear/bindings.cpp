#include "common/module.h"
#include "linear/linear.h"
#include "linear/product.h"

using namespace dalle;
using namespace pybind11::literals;

namespace {

ProductOperand operand(const Tensor& matrix) {
  return {matrix.data, matrix.dtype, matrix.strides[0], matrix.strides[1]};
}

}  // namespace

DALLE_BINDINGS(linear, m) {
  m.def(
      "linear",
      [](int dtype, int out_dtype, int64_t rows, int64_t inputs, int64_t outputs, uintptr_t x, int64_t x_stride,
         uintptr_t weight, int64_t weight_stride, uintptr_t bias, uintptr_t out, uintptr_t executor) {
        const Linear params{Dtype{dtype}, Dtype{out_dtype}, rows, inputs, outputs, pointer<void>(x), x_stride,
                            pointer<void>(weight), weight_stride, pointer<void>(bias), pointer<void>(out),
                            threads_of(executor)};
        DALLE_RUN(linear, params, executor);
      },
      "dtype"_a, "out_dtype"_a, "rows"_a, "inputs"_a, "outputs"_a, "x"_a, "x_stride"_a, "weight"_a, "weight_stride"_a,
      "bias"_a, "out"_a, "executor"_a);
  m.def(
      "product",
      [](const Tensor& a, const Tensor& b, const Tensor& bias, const Tensor& out, bool accumulate, uintptr_t executor) {
        const Product params{out.sizes[0],
                             out.sizes[1],
                             a.sizes[1],
                             operand(a),
                             operand(b),
                             bias.as<const float>(),
                             out.data,
                             out.dtype,
                             out.strides[0],
                             accumulate,
                             threads_of(executor)};
        DALLE_RUN(product, params, executor);
      },
      "a"_a, "b"_a, "bias"_a, "out"_a, "accumulate"_a, "executor"_a);
}
