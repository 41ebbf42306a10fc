#include "adamw/adamw.h"
#include "common/module.h"

using namespace dalle;
using namespace pybind11::literals;

DALLE_BINDINGS(adamw, m) {
  using Addresses = std::vector<uintptr_t>;
  m.def(
      "adamw16_step",
      [](const Addresses& parameters, const Addresses& gradients, const Addresses& first_moments,
         const Addresses& second_moments, const Addresses& steps, const std::vector<int64_t>& counts,
         int parameter_dtype, int gradient_dtype, bool first_moment_coded, bool second_moment_coded, double lr,
         double beta1, double beta2, double eps, double weight_decay, double max_variance, uintptr_t grad_scale,
         uintptr_t found_nonfinite, uintptr_t factors, const std::vector<int64_t>& numbers, bool stochastic_rounding,
         uint64_t rounding_seed, uintptr_t executor) {
        std::vector<AdamW16Tensor> tensors;
        tensors.reserve(parameters.size());
        for (size_t t = 0; t < parameters.size(); ++t) {
          tensors.push_back({pointer<void>(parameters[t]), pointer<const void>(gradients.at(t)),
                             pointer<void>(first_moments.at(t)), pointer<void>(second_moments.at(t)),
                             pointer<float>(steps.at(t)), counts.at(t), numbers.at(t)});
        }
        const AdamW16Step params{tensors.data(),
                                 static_cast<int64_t>(tensors.size()),
                                 Dtype{parameter_dtype},
                                 Dtype{gradient_dtype},
                                 first_moment_coded,
                                 second_moment_coded,
                                 lr,
                                 beta1,
                                 beta2,
                                 eps,
                                 weight_decay,
                                 max_variance,
                                 pointer<const float>(grad_scale),
                                 pointer<const uint8_t>(found_nonfinite),
                                 pointer<float>(factors),
                                 threads_of(executor),
                                 stochastic_rounding,
                                 rounding_seed};
        DALLE_RUN(adamw16_step, params, executor);
      },
      "parameters"_a, "gradients"_a, "first_moments"_a, "second_moments"_a, "steps"_a, "counts"_a,
      "parameter_dtype"_a, "gradient_dtype"_a, "first_moment_coded"_a, "second_moment_coded"_a, "lr"_a, "beta1"_a,
      "beta2"_a, "eps"_a, "weight_decay"_a, "max_variance"_a, "grad_scale"_a, "found_nonfinite"_a, "factors"_a,
      "numbers"_a, "stochastic_rounding"_a, "rounding_seed"_a, "executor"_a);
}
