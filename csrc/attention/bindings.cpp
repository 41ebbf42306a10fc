#include <array>
#include <tuple>

#include "attention/attention.h"
#include "attention/decode.h"
#include "common/module.h"

using namespace dalle;
using namespace pybind11::literals;

namespace {

// A tensor [batch, heads, seq, head_dim] comes as its address and its strides, a shape as that of q.
using Four = std::array<int64_t, 4>;
using HeadsTuple = std::tuple<uintptr_t, Four>;

Heads heads_of(const HeadsTuple& t) {
  const auto& [address, strides] = t;
  return {pointer<void>(address), strides[0], strides[1], strides[2]};
}

// So does a token's tensor [rows, heads, 1, head_dim]; a cache's text or image as its address, how many keys of a head
// (and sample) it has room for, and how many of them are seen.
using CacheTuple = std::tuple<uintptr_t, int64_t, int64_t>;

[[maybe_unused]] TokenHeads token_of(const HeadsTuple& t) {
  const auto& [address, strides] = t;
  return {pointer<void>(address), strides[0], strides[1], strides[3]};
}

// Work of fewer products than this is done before another thread has woken up.
constexpr int64_t PRODUCTS_OF_A_TEAM = 1 << 16;

int team_of(uintptr_t executor, const Four& shape) {
  const auto [batch, heads, seq, head_dim] = shape;
  return batch * heads * seq * seq * head_dim < PRODUCTS_OF_A_TEAM ? 1 : threads_of(executor);
}

}  // namespace

DALLE_BINDINGS(m) {
  m.def(
      "sparse_attention",
      [](int dtype, const Four& shape, int kind, int64_t text_len, int64_t height, int64_t width, int64_t kernel_size,
         float scale, const HeadsTuple& q, const HeadsTuple& k, const HeadsTuple& v, const HeadsTuple& out,
         uintptr_t lse, uintptr_t executor) {
        const auto [batch, heads, seq, head_dim] = shape;
        const Pattern pattern{PatternKind{kind}, seq, text_len, height, width, kernel_size};
        const SparseAttention params{Dtype{dtype}, batch, heads, head_dim, pattern, scale, heads_of(q), heads_of(k),
                                     heads_of(v), heads_of(out), pointer<float>(lse), team_of(executor, shape),
                                     nullptr};
        DALLE_RUN(sparse_attention, params, executor);
      },
      "dtype"_a, "shape"_a, "kind"_a, "text_len"_a, "height"_a, "width"_a, "kernel_size"_a, "scale"_a, "q"_a, "k"_a,
      "v"_a, "out"_a, "lse"_a, "executor"_a);
#if defined(DALLE_MODULE_CUDA)
  m.def(
      "sparse_attention_refusal",
      [](int dtype, const Four& shape, int kind, int64_t text_len, int64_t height, int64_t width, int64_t kernel_size,
         const HeadsTuple& q, const HeadsTuple& k, const HeadsTuple& v) {
        const auto [batch, heads, seq, head_dim] = shape;
        const Pattern pattern{PatternKind{kind}, seq, text_len, height, width, kernel_size};
        return cuda::sparse_attention_refusal({Dtype{dtype}, batch, heads, head_dim, pattern, 1.0f, heads_of(q),
                                               heads_of(k), heads_of(v), {}, nullptr, 1, nullptr});
      },
      "dtype"_a, "shape"_a, "kind"_a, "text_len"_a, "height"_a, "width"_a, "kernel_size"_a, "q"_a, "k"_a, "v"_a,
      "Why sparse_attention would do nothing, or None.");
#else
  m.def(
      "sparse_attention_backward",
      [](int dtype, const Four& shape, int kind, int64_t text_len, int64_t height, int64_t width, int64_t kernel_size,
         float scale, const HeadsTuple& grad_out, const HeadsTuple& q, const HeadsTuple& k, const HeadsTuple& v,
         const HeadsTuple& dq, const HeadsTuple& dk, const HeadsTuple& dv, uintptr_t executor) {
        const auto [batch, heads, seq, head_dim] = shape;
        const Pattern pattern{PatternKind{kind}, seq, text_len, height, width, kernel_size};
        const SparseAttentionBackward params{Dtype{dtype}, batch, heads, head_dim, pattern, scale, heads_of(grad_out),
                                             heads_of(q), heads_of(k), heads_of(v), heads_of(dq), heads_of(dk),
                                             heads_of(dv), team_of(executor, shape), nullptr};
        DALLE_RUN(sparse_attention_backward, params, executor);
      },
      "dtype"_a, "shape"_a, "kind"_a, "text_len"_a, "height"_a, "width"_a, "kernel_size"_a, "scale"_a, "grad_out"_a,
      "q"_a, "k"_a, "v"_a, "dq"_a, "dk"_a, "dv"_a, "executor"_a);

  m.def(
      "decode_attention",
      [](int dtype, const Four& sizes, float scale, const HeadsTuple& q, const HeadsTuple& k_new,
         const HeadsTuple& v_new, const CacheTuple& text, const CacheTuple& image, uintptr_t image_slots,
         int64_t new_key, uintptr_t out, uintptr_t executor) {
        const auto [prompts, samples, heads, head_dim] = sizes;
        const auto [text_data, text_capacity, text_keys] = text;
        const auto [image_data, image_capacity, image_keys] = image;
        const DecodeAttention params{Dtype{dtype}, prompts, samples, heads, head_dim, scale, token_of(q),
                                     token_of(k_new), token_of(v_new), pointer<void>(text_data),
                                     pointer<void>(image_data), text_capacity, image_capacity, text_keys, image_keys,
                                     pointer<const int32_t>(image_slots), new_key, pointer<void>(out),
                                     threads_of(executor)};
        DALLE_RUN(decode_attention, params, executor);
      },
      "dtype"_a, "sizes"_a, "scale"_a, "q"_a, "k_new"_a, "v_new"_a, "text"_a, "image"_a, "image_slots"_a, "new_key"_a,
      "out"_a, "executor"_a);
  m.def(
      "sparse_attention_workspace",
      [](int dtype, const Four& shape, int kind, int64_t text_len, int64_t height, int64_t width, int64_t kernel_size,
         bool backward, uintptr_t executor) {
        int64_t bytes = 0;
        const auto measured = [&](auto params) {
          params.dtype = Dtype{dtype}, params.batch = shape[0], params.heads = shape[1], params.head_dim = shape[3];
          params.pattern = {PatternKind{kind}, shape[2], text_len, height, width, kernel_size};
          params.threads = threads_of(executor), params.workspace = &bytes;
          return params;
        };
        if (backward) {
          DALLE_RUN(sparse_attention_backward, measured(SparseAttentionBackward{}), executor);
        } else {
          DALLE_RUN(sparse_attention, measured(SparseAttention{}), executor);
        }
        return bytes;
      },
      "dtype"_a, "shape"_a, "kind"_a, "text_len"_a, "height"_a, "width"_a, "kernel_size"_a, "backward"_a,
      "executor"_a);
#endif
}
