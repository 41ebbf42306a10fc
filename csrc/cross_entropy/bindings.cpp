#include "cross_entropy/cross_entropy.h"

#include <memory>
#include <tuple>

#include "common/module.h"

using namespace dalle;
using namespace pybind11::literals;

namespace {

// The element number `offset` of the numbers at an address, or nullptr for none.
template <class T>
T* from(uintptr_t address, int64_t offset) {
  return address == 0 ? nullptr : pointer<T>(address) + offset;
}

}  // namespace

DALLE_BINDINGS(m) {
  m.def(
      "cross_entropy_targets",
      [](int64_t rows, int64_t classes, uintptr_t target, int64_t stride, int64_t ignore_index, uintptr_t) {
        const CrossEntropyTargets found =
            cross_entropy_targets(pointer<const int64_t>(target), stride, rows, classes, ignore_index);
        return std::make_tuple(found.counted, found.outside);
      },
      "rows"_a, "classes"_a, "target"_a, "stride"_a, "ignore_index"_a, "executor"_a);
  // Targets, losses and what reaches them are those of all rows, of which the chunk's begin with number `first`.
  m.def(
      "cross_entropy_chunk",
      [](uintptr_t logits, int64_t rows, int64_t classes, uintptr_t target, int64_t target_stride,
         int64_t ignore_index, int64_t first, uintptr_t bias, uintptr_t loss, uintptr_t row_scale,
         int64_t row_scale_stride, uintptr_t row_factor, uintptr_t bias_sums, uintptr_t executor) {
        double total = 0;
        const std::unique_ptr<float[]> workspace(new float[cross_entropy_workspace(classes, rows)]);
        const CrossEntropyChunk params{pointer<float>(logits),
                                       classes,
                                       rows,
                                       pointer<const float>(bias),
                                       from<const int64_t>(target, first * target_stride),
                                       target_stride,
                                       ignore_index,
                                       from<const float>(row_scale, first * row_scale_stride),
                                       row_scale_stride,
                                       from<float>(loss, first),
                                       &total,
                                       pointer<float>(row_factor),
                                       pointer<double>(bias_sums),
                                       workspace.get(),
                                       threads_of(executor)};
        DALLE_RUN(cross_entropy_chunk, params, executor);
        return total;
      },
      "logits"_a, "rows"_a, "classes"_a, "target"_a, "target_stride"_a, "ignore_index"_a, "first"_a, "bias"_a,
      "loss"_a, "row_scale"_a, "row_scale_stride"_a, "row_factor"_a, "bias_sums"_a, "executor"_a);
  m.def(
      "gradient_sum",
      [](uintptr_t term, uintptr_t gradient, uintptr_t low, int64_t count, bool first, bool last, int dtype,
         uintptr_t executor) {
        const GradientSum params{pointer<const float>(term), pointer<uint16_t>(gradient), pointer<uint8_t>(low), count,
                                 first, last, Dtype{dtype}, threads_of(executor)};
        DALLE_RUN(gradient_sum, params, executor);
      },
      "term"_a, "gradient"_a, "low"_a, "count"_a, "first"_a, "last"_a, "dtype"_a, "executor"_a);
  m.def(
      "gradient_scale",
      [](uintptr_t input, uintptr_t output, int64_t count, int dtype, uintptr_t factor, uintptr_t executor) {
        const GradientScale params{pointer<const void>(input), pointer<void>(output),       count,
                                   Dtype{dtype},               pointer<const float>(factor), threads_of(executor)};
        DALLE_RUN(gradient_scale, params, executor);
      },
      "input"_a, "output"_a, "count"_a, "dtype"_a, "factor"_a, "executor"_a);
}
