#include "cross_entropy/cross_entropy.h"

#include <memory>
#include <tuple>

#include "common/module.h"

using namespace dalle;
using namespace pybind11::literals;

namespace {

// From the element number `offset` on, or nullptr for None.
template <class T>
T* from(const Tensor& tensor, int64_t offset) {
  return tensor.data == nullptr ? nullptr : tensor.as<T>() + offset;
}

CrossEntropyTargets targets_of(const Tensor& target, int64_t classes, int64_t ignore_index) {
  return cross_entropy_targets(target.as<const int64_t>(), target.strides[0], target.sizes[0], classes, ignore_index);
}

// A chunk's logits [classes, rows]. Targets, losses and what reaches them are those of all rows, of which the chunk's
// begin with number `first`.
double run_chunk(const Tensor& logits, const Tensor& target, const Tensor& bias, const Tensor& loss,
                 const Tensor& row_scale, const Tensor& row_factor, const Tensor& bias_sums, int64_t first,
                 int64_t ignore_index, uintptr_t executor) {
  double total = 0;
  const int64_t classes = logits.sizes[0], rows = logits.sizes[1];
  const int64_t row_scale_stride = row_scale.dims == 0 ? 0 : row_scale.strides[0];
  const std::unique_ptr<float[]> workspace(new float[cross_entropy_workspace(classes, rows)]);
  const CrossEntropyChunk params{logits.as<float>(),
                                 classes,
                                 rows,
                                 bias.as<const float>(),
                                 from<const int64_t>(target, first * target.strides[0]),
                                 target.strides[0],
                                 ignore_index,
                                 from<const float>(row_scale, first * row_scale_stride),
                                 row_scale_stride,
                                 from<float>(loss, first),
                                 &total,
                                 row_factor.as<float>(),
                                 bias_sums.as<double>(),
                                 workspace.get(),
                                 threads_of(executor)};
  DALLE_RUN(cross_entropy_chunk, params, executor);
  return total;
}

}  // namespace

DALLE_BINDINGS(cross_entropy, m) {
  m.def(
      "cross_entropy_targets",
      [](const Tensor& target, int64_t classes, int64_t ignore_index, uintptr_t) {
        const CrossEntropyTargets found = targets_of(target, classes, ignore_index);
        return std::make_tuple(found.counted, found.outside);
      },
      "target"_a, "classes"_a, "ignore_index"_a, "executor"_a);
  m.def("cross_entropy_chunk", &run_chunk, "logits"_a, "target"_a, "bias"_a, "loss"_a, "row_scale"_a, "row_factor"_a,
        "bias_sums"_a, "first"_a, "ignore_index"_a, "executor"_a);
  // Where all rows are one chunk: writes the mean or the sum of their losses. Returns -1, or the first row whose target
  // is no class, and then writes nothing.
  m.def(
      "cross_entropy_reduced",
      [](const Tensor& logits, const Tensor& target, const Tensor& bias, const Tensor& loss, bool mean,
         int64_t ignore_index, uintptr_t executor) {
        const CrossEntropyTargets found = targets_of(target, logits.sizes[0], ignore_index);
        if (found.outside >= 0) return found.outside;
        const Tensor none{};
        const double total = run_chunk(logits, target, bias, none, none, none, none, 0, ignore_index, executor);
        *loss.as<float>() = static_cast<float>(mean ? total / static_cast<double>(found.counted) : total);
        return int64_t{-1};
      },
      "logits"_a, "target"_a, "bias"_a, "loss"_a, "mean"_a, "ignore_index"_a, "executor"_a);
  m.def(
      "gradient_sum",
      [](const Tensor& term, const Tensor& gradient, const Tensor& low, int64_t count, bool first, bool last,
         uintptr_t executor) {
        const GradientSum params{term.as<const float>(), gradient.as<uint16_t>(), low.as<uint8_t>(), count,
                                 first, last, gradient.dtype, threads_of(executor)};
        DALLE_RUN(gradient_sum, params, executor);
      },
      "term"_a, "gradient"_a, "low"_a, "count"_a, "first"_a, "last"_a, "executor"_a);
  m.def(
      "gradient_scale",
      [](const Tensor& input, const Tensor& output, int64_t count, const Tensor& factor, uintptr_t executor) {
        const GradientScale params{input.data, output.data, count, input.dtype, factor.as<const float>(),
                                   threads_of(executor)};
        DALLE_RUN(gradient_scale, params, executor);
      },
      "input"_a, "output"_a, "count"_a, "factor"_a, "executor"_a);
}
