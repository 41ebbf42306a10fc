#include "common/module.h"
#include "gumbel_softmax/gumbel_softmax.h"

#include <tuple>

using namespace dalle;
using namespace pybind11::literals;

namespace {

// A tensor seen as rows comes as its address, the strides of its rows' dimensions and that of its columns; the noise as
// the addresses of seed, offset and tau.
using RowTuple = std::tuple<uintptr_t, std::vector<int64_t>, int64_t>;
using NoiseTuple = std::tuple<uintptr_t, uintptr_t, uintptr_t>;

RowTensor tensor_of(const std::vector<int64_t>& sizes, const RowTuple& t) {
  return {pointer<void>(std::get<0>(t)), strided(sizes, std::get<1>(t)), std::get<2>(t)};
}

GumbelNoise noise_of(const NoiseTuple& t) {
  const auto [seed, offset, tau] = t;
  return {pointer<const int64_t>(seed), pointer<const int64_t>(offset), pointer<const float>(tau)};
}

// The codebook's address, dtype, width, and strides from code to code and along the width.
using CodebookTuple = std::tuple<uintptr_t, int, int64_t, int64_t, int64_t>;

Codebook codebook_of(const CodebookTuple& t) {
  const auto [address, dtype, width, column_stride, width_stride] = t;
  return {pointer<void>(address), Dtype{dtype}, width, column_stride, width_stride};
}

}  // namespace

DALLE_BINDINGS(m) {
  m.def(
      "gumbel_softmax",
      [](int dtype, const std::vector<int64_t>& rows, int64_t columns, bool hard, const NoiseTuple& noise,
         const RowTuple& logits, const RowTuple& y, uintptr_t kl, uintptr_t executor) {
        const GumbelSoftmax params{Dtype{dtype}, columns, hard, noise_of(noise), tensor_of(rows, logits),
                                   tensor_of(rows, y), pointer<float>(kl), threads_of(executor)};
        DALLE_RUN(gumbel_softmax, params, executor);
      },
      "dtype"_a, "rows"_a, "columns"_a, "hard"_a, "noise"_a, "logits"_a, "y"_a, "kl"_a, "executor"_a);
  m.def(
      "gumbel_softmax_backward",
      [](int dtype, const std::vector<int64_t>& rows, int64_t columns, bool hard, const NoiseTuple& noise,
         const RowTuple& grad_y, const RowTuple& logits, const RowTuple& y, const RowTuple& grad_kl,
         const RowTuple& grad_logits, uintptr_t executor) {
        const GumbelSoftmaxBackward params{Dtype{dtype}, columns, hard, noise_of(noise), tensor_of(rows, grad_y),
                                           tensor_of(rows, logits), tensor_of(rows, y), tensor_of(rows, grad_kl),
                                           tensor_of(rows, grad_logits), threads_of(executor)};
        DALLE_RUN(gumbel_softmax_backward, params, executor);
      },
      "dtype"_a, "rows"_a, "columns"_a, "hard"_a, "noise"_a, "grad_y"_a, "logits"_a, "y"_a, "grad_kl"_a,
      "grad_logits"_a, "executor"_a);
  m.def(
      "gumbel_codebook",
      [](int dtype, const std::vector<int64_t>& rows, int64_t columns, const NoiseTuple& noise, const RowTuple& logits,
         const CodebookTuple& codebook, const RowTuple& embedding, uintptr_t kl, uintptr_t executor) {
        const GumbelCodebook params{Dtype{dtype}, columns, noise_of(noise), tensor_of(rows, logits),
                                    codebook_of(codebook), tensor_of(rows, embedding), pointer<float>(kl),
                                    threads_of(executor)};
        DALLE_RUN(gumbel_codebook, params, executor);
      },
      "dtype"_a, "rows"_a, "columns"_a, "noise"_a, "logits"_a, "codebook"_a, "embedding"_a, "kl"_a, "executor"_a);
  m.def(
      "gumbel_codebook_backward",
      [](int dtype, const std::vector<int64_t>& rows, int64_t columns, const NoiseTuple& noise,
         const RowTuple& grad_embedding, const RowTuple& grad_kl, const RowTuple& logits,
         const CodebookTuple& codebook, const RowTuple& grad_logits, const CodebookTuple& grad_codebook,
         uintptr_t executor) {
        const GumbelCodebookBackward params{Dtype{dtype}, columns, noise_of(noise), tensor_of(rows, grad_embedding),
                                            tensor_of(rows, grad_kl), tensor_of(rows, logits), codebook_of(codebook),
                                            tensor_of(rows, grad_logits), codebook_of(grad_codebook),
                                            threads_of(executor)};
        DALLE_RUN(gumbel_codebook_backward, params, executor);
      },
      "dtype"_a, "rows"_a, "columns"_a, "noise"_a, "grad_embedding"_a, "grad_kl"_a, "logits"_a, "codebook"_a,
      "grad_logits"_a, "grad_codebook"_a, "executor"_a);
}
