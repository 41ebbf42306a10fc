#include "common/module.h"
#include "gumbel_softmax/gumbel_softmax.h"

using namespace dalle;
using namespace pybind11::literals;

namespace {

// A call's logits tell its rows from its columns, which are along `dim`, counted from the end where it is negative.
struct Layout {
  int64_t dim, columns;

  Layout(const Tensor& logits, int64_t dim_) : dim(dim_ < 0 ? dim_ + logits.dims : dim_), columns(logits.sizes[dim]) {}

  RowTensor rows_of(const Tensor& t) const {
    Strided rows{t.dims - 1, {}, {}};
    for (int d = 0; d < rows.dims; ++d) {
      const int from = d < dim ? d : d + 1;
      rows.sizes[d] = t.sizes[from], rows.strides[d] = t.strides[from];
    }
    return {t.data, rows, t.strides[dim]};
  }
};

// A tensor with one number a row.
RowTensor numbers_of(const Tensor& t) { return {t.data, t.shape(), 1}; }

GumbelNoise noise_of(const Tensor& seed, const Tensor& offset, const Tensor& tau) {
  return {seed.as<const int64_t>(), offset.as<const int64_t>(), tau.as<const float>()};
}

#if !defined(DALLE_MODULE_CUDA)
Codebook codebook_of(const Tensor& t) { return {t.data, t.dtype, t.sizes[1], t.strides[0], t.strides[1]}; }
#endif

}  // namespace

DALLE_BINDINGS(gumbel_softmax, m) {
  m.def(
      "gumbel_softmax",
      [](const Tensor& logits, const Tensor& y, const Tensor& kl, const Tensor& seed, const Tensor& offset,
         const Tensor& tau, bool hard, int64_t dim, uintptr_t executor) {
        const Layout layout(logits, dim);
        const GumbelSoftmax params{logits.dtype, layout.columns, hard, noise_of(seed, offset, tau),
                                   layout.rows_of(logits), layout.rows_of(y), kl.as<float>(), threads_of(executor)};
        DALLE_RUN(gumbel_softmax, params, executor);
      },
      "logits"_a, "y"_a, "kl"_a, "seed"_a, "offset"_a, "tau"_a, "hard"_a, "dim"_a, "executor"_a);
  m.def(
      "gumbel_softmax_backward",
      [](const Tensor& grad_y, const Tensor& grad_kl, const Tensor& logits, const Tensor& y, const Tensor& grad_logits,
         const Tensor& seed, const Tensor& offset, const Tensor& tau, bool hard, int64_t dim, uintptr_t executor) {
        const Layout layout(logits, dim);
        const RowTensor none{nullptr, layout.rows_of(y).rows, 0};
        const GumbelSoftmaxBackward params{logits.dtype, layout.columns, hard, noise_of(seed, offset, tau),
                                           layout.rows_of(grad_y), layout.rows_of(logits), layout.rows_of(y),
                                           grad_kl.data != nullptr ? numbers_of(grad_kl) : none,
                                           layout.rows_of(grad_logits), threads_of(executor)};
        DALLE_RUN(gumbel_softmax_backward, params, executor);
      },
      "grad_y"_a, "grad_kl"_a, "logits"_a, "y"_a, "grad_logits"_a, "seed"_a, "offset"_a, "tau"_a, "hard"_a, "dim"_a,
      "executor"_a);
#if !defined(DALLE_MODULE_CUDA)
  m.def(
      "gumbel_codebook",
      [](const Tensor& logits, const Tensor& codebook, const Tensor& embedding, const Tensor& kl, const Tensor& seed,
         const Tensor& offset, const Tensor& tau, int64_t dim, uintptr_t executor) {
        const Layout layout(logits, dim);
        const GumbelCodebook params{logits.dtype, layout.columns, noise_of(seed, offset, tau), layout.rows_of(logits),
                                    codebook_of(codebook), layout.rows_of(embedding), kl.as<float>(),
                                    threads_of(executor)};
        DALLE_RUN(gumbel_codebook, params, executor);
      },
      "logits"_a, "codebook"_a, "embedding"_a, "kl"_a, "seed"_a, "offset"_a, "tau"_a, "dim"_a, "executor"_a);
  m.def(
      "gumbel_codebook_backward",
      [](const Tensor& grad_embedding, const Tensor& grad_kl, const Tensor& logits, const Tensor& codebook,
         const Tensor& grad_logits, const Tensor& grad_codebook, const Tensor& seed, const Tensor& offset,
         const Tensor& tau, int64_t dim, uintptr_t executor) {
        const Layout layout(logits, dim);
        const GumbelCodebookBackward params{logits.dtype, layout.columns, noise_of(seed, offset, tau),
                                            layout.rows_of(grad_embedding), numbers_of(grad_kl),
                                            layout.rows_of(logits), codebook_of(codebook),
                                            layout.rows_of(grad_logits), codebook_of(grad_codebook),
                                            threads_of(executor)};
        DALLE_RUN(gumbel_codebook_backward, params, executor);
      },
      "grad_embedding"_a, "grad_kl"_a, "logits"_a, "codebook"_a, "grad_logits"_a, "grad_codebook"_a, "seed"_a,
      "offset"_a, "tau"_a, "dim"_a, "executor"_a);
#endif
}
