#include "common/module.h"
#include "gumbel_softmax/gumbel_softmax.h"

#include <optional>
#include <tuple>

using namespace dalle;
using namespace pybind11::literals;

namespace {

// A tensor comes as its address and strides, the noise as the addresses of seed, offset and tau.
using TensorTuple = std::tuple<uintptr_t, std::vector<int64_t>>;
using NoiseTuple = std::tuple<uintptr_t, uintptr_t, uintptr_t>;

// Takes away and returns the number at `dim`, which is counted from the end where it is negative.
int64_t take(std::vector<int64_t>& numbers, int64_t dim) {
  const size_t place = dim < 0 ? numbers.size() + dim : dim;
  const int64_t taken = numbers.at(place);
  numbers.erase(numbers.begin() + place);
  return taken;
}

// The sizes of a call's logits, told apart: those of the rows, and the columns along dim.
struct Shape {
  std::vector<int64_t> rows;
  int64_t dim, columns;

  Shape(const std::vector<int64_t>& sizes, int64_t dim_) : rows(sizes), dim(dim_), columns(take(rows, dim)) {}

  RowTensor tensor(const TensorTuple& t) const {
    auto [address, strides] = t;
    const int64_t column_stride = take(strides, dim);
    return {pointer<void>(address), strided(rows, strides), column_stride};
  }

  // A tensor with one number a row.
  RowTensor numbers(const TensorTuple& t) const {
    return {pointer<void>(std::get<0>(t)), strided(rows, std::get<1>(t)), 1};
  }
};

GumbelNoise noise_of(const NoiseTuple& t) {
  const auto [seed, offset, tau] = t;
  return {pointer<const int64_t>(seed), pointer<const int64_t>(offset), pointer<const float>(tau)};
}

#if !defined(DALLE_MODULE_CUDA)
// The codebook's address, dtype, width, and strides from code to code and along the width.
using CodebookTuple = std::tuple<uintptr_t, int, int64_t, int64_t, int64_t>;

Codebook codebook_of(const CodebookTuple& t) {
  const auto [address, dtype, width, column_stride, width_stride] = t;
  return {pointer<void>(address), Dtype{dtype}, width, column_stride, width_stride};
}
#endif

}  // namespace

DALLE_BINDINGS(m) {
  m.def(
      "gumbel_softmax",
      [](int dtype, const std::vector<int64_t>& sizes, int64_t dim, const NoiseTuple& noise, bool hard,
         const TensorTuple& logits, const TensorTuple& y, uintptr_t kl, uintptr_t executor) {
        const Shape shape(sizes, dim);
        const GumbelSoftmax params{Dtype{dtype}, shape.columns, hard, noise_of(noise), shape.tensor(logits),
                                   shape.tensor(y), pointer<float>(kl), threads_of(executor)};
        DALLE_RUN(gumbel_softmax, params, executor);
      },
      "dtype"_a, "sizes"_a, "dim"_a, "noise"_a, "hard"_a, "logits"_a, "y"_a, "kl"_a, "executor"_a);
  m.def(
      "gumbel_softmax_backward",
      [](int dtype, const std::vector<int64_t>& sizes, int64_t dim, const NoiseTuple& noise, bool hard,
         const TensorTuple& grad_y, const TensorTuple& logits, const TensorTuple& y,
         const std::optional<TensorTuple>& grad_kl, const TensorTuple& grad_logits, uintptr_t executor) {
        const Shape shape(sizes, dim);
        const RowTensor none{nullptr, shape.tensor(y).rows, 0};
        const GumbelSoftmaxBackward params{Dtype{dtype}, shape.columns, hard, noise_of(noise), shape.tensor(grad_y),
                                           shape.tensor(logits), shape.tensor(y),
                                           grad_kl ? shape.numbers(*grad_kl) : none, shape.tensor(grad_logits),
                                           threads_of(executor)};
        DALLE_RUN(gumbel_softmax_backward, params, executor);
      },
      "dtype"_a, "sizes"_a, "dim"_a, "noise"_a, "hard"_a, "grad_y"_a, "logits"_a, "y"_a, "grad_kl"_a, "grad_logits"_a,
      "executor"_a);
#if !defined(DALLE_MODULE_CUDA)
  m.def(
      "gumbel_codebook",
      [](int dtype, const std::vector<int64_t>& sizes, int64_t dim, const NoiseTuple& noise, const TensorTuple& logits,
         const CodebookTuple& codebook, const TensorTuple& embedding, uintptr_t kl, uintptr_t executor) {
        const Shape shape(sizes, dim);
        const GumbelCodebook params{Dtype{dtype}, shape.columns, noise_of(noise), shape.tensor(logits),
                                    codebook_of(codebook), shape.tensor(embedding), pointer<float>(kl),
                                    threads_of(executor)};
        DALLE_RUN(gumbel_codebook, params, executor);
      },
      "dtype"_a, "sizes"_a, "dim"_a, "noise"_a, "logits"_a, "codebook"_a, "embedding"_a, "kl"_a, "executor"_a);
  m.def(
      "gumbel_codebook_backward",
      [](int dtype, const std::vector<int64_t>& sizes, int64_t dim, const NoiseTuple& noise,
         const TensorTuple& grad_embedding, const TensorTuple& grad_kl, const TensorTuple& logits,
         const CodebookTuple& codebook, const TensorTuple& grad_logits, const CodebookTuple& grad_codebook,
         uintptr_t executor) {
        const Shape shape(sizes, dim);
        const GumbelCodebookBackward params{Dtype{dtype}, shape.columns, noise_of(noise),
                                            shape.tensor(grad_embedding), shape.numbers(grad_kl),
                                            shape.tensor(logits), codebook_of(codebook), shape.tensor(grad_logits),
                                            codebook_of(grad_codebook), threads_of(executor)};
        DALLE_RUN(gumbel_codebook_backward, params, executor);
      },
      "dtype"_a, "sizes"_a, "dim"_a, "noise"_a, "grad_embedding"_a, "grad_kl"_a, "logits"_a, "codebook"_a,
      "grad_logits"_a, "grad_codebook"_a, "executor"_a);
#endif
}
