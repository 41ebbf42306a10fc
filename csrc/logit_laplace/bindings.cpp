#include "logit_laplace/logit_laplace.h"

#include "common/module.h"

using namespace dalle;
using namespace pybind11::literals;

namespace {

LogitLaplaceTensor given(const Tensor& t) { return {t.data, t.dtype, t.shape()}; }

}  // namespace

DALLE_BINDINGS(logit_laplace, m) {
  m.def(
      "logit_laplace_loss",
      [](const Tensor& x, const Tensor& mu, const Tensor& log_b, const Tensor& loss, const Tensor& partial,
         double divisor, uintptr_t executor) {
        const LogitLaplaceLoss params{given(x), given(mu), given(log_b), loss.as<float>(),
                                      partial.as<double>(), divisor, threads_of(executor)};
        DALLE_RUN(logit_laplace_loss, params, executor);
      },
      "x"_a, "mu"_a, "log_b"_a, "loss"_a, "partial"_a, "divisor"_a, "executor"_a);
  m.def(
      "logit_laplace_loss_backward",
      [](const Tensor& grad, const Tensor& x, const Tensor& mu, const Tensor& log_b, const Tensor& grad_mu,
         const Tensor& grad_log_b, double divisor, uintptr_t executor) {
        const LogitLaplaceLossBackward params{given(grad),  given(x),        given(mu), given(log_b),
                                              grad_mu.data, grad_log_b.data, divisor,   threads_of(executor)};
        DALLE_RUN(logit_laplace_loss_backward, params, executor);
      },
      "grad"_a, "x"_a, "mu"_a, "log_b"_a, "grad_mu"_a, "grad_log_b"_a, "divisor"_a, "executor"_a);
}
