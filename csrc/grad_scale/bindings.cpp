#include "common/module.h"
#include "grad_scale/grad_scale.h"

using namespace dalle;
using namespace pybind11::literals;

namespace {

using Addresses = std::vector<uintptr_t>;

std::vector<GradScaleTensor> listed(const Addresses& inputs, const Addresses& outputs,
                                    const std::vector<int64_t>& counts) {
  std::vector<GradScaleTensor> tensors;
  tensors.reserve(inputs.size());
  for (size_t t = 0; t < inputs.size(); ++t) {
    tensors.push_back({pointer<const void>(inputs[t]), pointer<void>(outputs.at(t)), counts.at(t)});
  }
  return tensors;
}

}  // namespace

DALLE_BINDINGS(grad_scale, m) {
  m.def(
      "scale_cast_filter",
      [](const Addresses& inputs, const Addresses& outputs, const std::vector<int64_t>& counts, int input_dtype,
         int output_dtype, uintptr_t scale, uintptr_t nonfinite, uintptr_t executor) {
        const std::vector<GradScaleTensor> tensors = listed(inputs, outputs, counts);
        const ScaleCastFilter params{tensors.data(),      static_cast<int64_t>(tensors.size()),
                                     Dtype{input_dtype},  Dtype{output_dtype},
                                     pointer<const float>(scale), pointer<uint8_t>(nonfinite),
                                     threads_of(executor)};
        DALLE_RUN(scale_cast_filter, params, executor);
      },
      "inputs"_a, "outputs"_a, "counts"_a, "input_dtype"_a, "output_dtype"_a, "scale"_a, "nonfinite"_a, "executor"_a);
  m.def(
      "filter_cast_unscale",
      [](const Addresses& inputs, const Addresses& outputs, const std::vector<int64_t>& counts, int input_dtype,
         uintptr_t scale, uintptr_t nonfinite, uintptr_t executor) {
        const std::vector<GradScaleTensor> tensors = listed(inputs, outputs, counts);
        const FilterCastUnscale params{tensors.data(),     static_cast<int64_t>(tensors.size()),
                                       Dtype{input_dtype}, pointer<const float>(scale),
                                       pointer<uint8_t>(nonfinite), threads_of(executor)};
        DALLE_RUN(filter_cast_unscale, params, executor);
      },
      "inputs"_a, "outputs"_a, "counts"_a, "input_dtype"_a, "scale"_a, "nonfinite"_a, "executor"_a);
}
