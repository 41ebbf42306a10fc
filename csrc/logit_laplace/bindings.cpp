#include "logit_laplace/logit_laplace.h"

#include <tuple>

#include "common/module.h"

using namespace dalle;
using namespace pybind11::literals;

namespace {

// data_ptr(), dtype, stride(); the sizes are those of x.
using Tensor = std::tuple<uintptr_t, int, std::vector<int64_t>>;

LogitLaplaceTensor tensor(const Tensor& given, const std::vector<int64_t>& sizes) {
  const auto& [address, dtype, strides] = given;
  return {pointer<const void>(address), Dtype{dtype}, strided(sizes, strides)};
}

}  // namespace

DALLE_BINDINGS(m) {
  m.def(
      "logit_laplace_loss",
      [](const std::vector<int64_t>& sizes, const Tensor& x, const Tensor& mu, const Tensor& log_b, uintptr_t loss,
         uintptr_t partial, double divisor, uintptr_t executor) {
        const LogitLaplaceLoss params{tensor(x, sizes),         tensor(mu, sizes), tensor(log_b, sizes),
                                      pointer<float>(loss),     pointer<double>(partial), divisor,
                                      threads_of(executor)};
        DALLE_RUN(logit_laplace_loss, params, executor);
      },
      "sizes"_a, "x"_a, "mu"_a, "log_b"_a, "loss"_a, "partial"_a, "divisor"_a, "executor"_a);
  m.def(
      "logit_laplace_loss_backward",
      [](const std::vector<int64_t>& sizes, const Tensor& grad, const Tensor& x, const Tensor& mu, const Tensor& log_b,
         uintptr_t grad_mu, uintptr_t grad_log_b, double divisor, uintptr_t executor) {
        const LogitLaplaceLossBackward params{tensor(grad, sizes),      tensor(x, sizes),          tensor(mu, sizes),
                                              tensor(log_b, sizes),     pointer<void>(grad_mu),    pointer<void>(grad_log_b),
                                              divisor,                  threads_of(executor)};
        DALLE_RUN(logit_laplace_loss_backward, params, executor);
      },
      "sizes"_a, "grad"_a, "x"_a, "mu"_a, "log_b"_a, "grad_mu"_a, "grad_log_b"_a, "divisor"_a, "executor"_a);
}
