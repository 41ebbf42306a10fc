#include <array>

#include "attention/attention.h"
#include "attention/decode.h"
#include "common/module.h"

using namespace dalle;
using namespace pybind11::literals;

namespace {

// A shape [batch, heads, seq, head_dim], as that of q.
using Four = std::array<int64_t, 4>;

Four sizes_of(const Tensor& t) { return {t.sizes[0], t.sizes[1], t.sizes[2], t.sizes[3]}; }
Heads heads_of(const Tensor& t) { return {t.data, t.strides[0], t.strides[1], t.strides[2]}; }
TokenHeads token_heads(const Tensor& t) { return {t.data, t.strides[0], t.strides[1], t.strides[3]}; }

// A decode step on a GPU but for the scale, the place and the output.
[[maybe_unused]] DecodeStep step_of(const Tensor& q, const Tensor& k_new, const Tensor& v_new, const Tensor& text,
                                    const Tensor& image, const Pattern& pattern) {
  DecodeStep step{};
  step.dtype = q.dtype, step.pattern = pattern;
  step.prompts = image.sizes[1], step.heads = image.sizes[2], step.samples = image.sizes[3];
  step.image_capacity = image.sizes[4], step.head_dim = image.sizes[5];
  step.q = token_heads(q), step.k_new = token_heads(k_new), step.v_new = token_heads(v_new);
  step.text = text.data, step.image = image.data;
  return step;
}

// Work of fewer products than this is done before another thread has woken up.
constexpr int64_t PRODUCTS_OF_A_TEAM = 1 << 16;

int team_of(uintptr_t executor, const Four& shape) {
  const auto [batch, heads, seq, head_dim] = shape;
  return batch * heads * seq * seq * head_dim < PRODUCTS_OF_A_TEAM ? 1 : threads_of(executor);
}

}  // namespace

DALLE_BINDINGS(attention, m) {
  m.def(
      "sparse_attention",
      [](const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse, int kind,
         int64_t text_len, int64_t height, int64_t width, int64_t kernel_size, float scale, uintptr_t executor) {
        const auto [batch, heads, seq, head_dim] = sizes_of(q);
        const Pattern pattern{PatternKind{kind}, seq, text_len, height, width, kernel_size};
        const SparseAttention params{q.dtype, batch, heads, head_dim, pattern, scale, heads_of(q), heads_of(k),
                                     heads_of(v), heads_of(out), lse.as<float>(), team_of(executor, sizes_of(q)),
                                     nullptr};
        DALLE_RUN(sparse_attention, params, executor);
      },
      "q"_a, "k"_a, "v"_a, "out"_a, "lse"_a, "kind"_a, "text_len"_a, "height"_a, "width"_a, "kernel_size"_a, "scale"_a,
      "executor"_a);
#if defined(DALLE_MODULE_CUDA)
  m.def(
      "sparse_attention_refusal",
      [](const Tensor& q, const Tensor& k, const Tensor& v, int kind, int64_t text_len, int64_t height, int64_t width,
         int64_t kernel_size) {
        const auto [batch, heads, seq, head_dim] = sizes_of(q);
        const Pattern pattern{PatternKind{kind}, seq, text_len, height, width, kernel_size};
        return cuda::sparse_attention_refusal({q.dtype, batch, heads, head_dim, pattern, 1.0f, heads_of(q), heads_of(k),
                                               heads_of(v), {}, nullptr, 1, nullptr});
      },
      "q"_a, "k"_a, "v"_a, "kind"_a, "text_len"_a, "height"_a, "width"_a, "kernel_size"_a,
      "Why sparse_attention would do nothing, or None.");
  m.def(
      "sparse_attention_backward",
      [](const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
         const Tensor& lse, const Tensor& dq, const Tensor& dk, const Tensor& dv, uintptr_t scratch, int kind,
         int64_t text_len, int64_t height, int64_t width, int64_t kernel_size, float scale, uintptr_t stream) {
        const auto [batch, heads, seq, head_dim] = sizes_of(q);
        const Pattern pattern{PatternKind{kind}, seq, text_len, height, width, kernel_size};
        const SparseAttentionBackward params{q.dtype, batch, heads, head_dim, pattern, scale, heads_of(grad_out),
                                             heads_of(q), heads_of(k), heads_of(v), heads_of(dq), heads_of(dk),
                                             heads_of(dv), 1, nullptr, heads_of(out), lse.as<float>(),
                                             pointer<void>(scratch)};
        DALLE_RUN(sparse_attention_backward, params, stream);
      },
      "grad_out"_a, "q"_a, "k"_a, "v"_a, "out"_a, "lse"_a, "dq"_a, "dk"_a, "dv"_a, "scratch"_a, "kind"_a, "text_len"_a,
      "height"_a, "width"_a, "kernel_size"_a, "scale"_a, "executor"_a);
  m.def(
      "sparse_attention_backward_scratch",
      [](const Four& shape, int kind, int64_t text_len, int64_t height, int64_t width, int64_t kernel_size) {
        int64_t bytes = 0;
        SparseAttentionBackward params{};
        params.batch = shape[0], params.heads = shape[1], params.head_dim = shape[3], params.workspace = &bytes;
        params.pattern = {PatternKind{kind}, shape[2], text_len, height, width, kernel_size};
        DALLE_RUN(sparse_attention_backward, params, uintptr_t{0});
        return bytes;
      },
      "shape"_a, "kind"_a, "text_len"_a, "height"_a, "width"_a, "kernel_size"_a);
  // `text` and `image` are those of a KVCache; `place` is the address of a number of 8 bytes or 4, or 0.
  m.def(
      "decode_attention",
      [](const Tensor& q, const Tensor& k_new, const Tensor& v_new, const Tensor& text, const Tensor& image,
         const Tensor& out, int64_t position, uintptr_t place, bool wide_place, int kind, int64_t text_len,
         int64_t height, int64_t width, int64_t kernel_size, float scale, uintptr_t stream) {
        const Pattern pattern{PatternKind{kind}, 0, text_len, height, width, kernel_size};
        DecodeStep step = step_of(q, k_new, v_new, text, image, pattern);
        step.scale = scale, step.out = out.data;
        step.position = position, step.place = pointer<void>(place), step.wide_place = wide_place;
        DALLE_RUN(decode_attention, step, stream);
      },
      "q"_a, "k_new"_a, "v_new"_a, "text"_a, "image"_a, "out"_a, "position"_a, "place"_a, "wide_place"_a, "kind"_a,
      "text_len"_a, "height"_a, "width"_a, "kernel_size"_a, "scale"_a, "executor"_a);
  m.def(
      "decode_attention_refusal",
      [](const Tensor& q, const Tensor& k_new, const Tensor& v_new, const Tensor& text, const Tensor& image, int kind,
         int64_t text_len, int64_t height, int64_t width, int64_t kernel_size) {
        return cuda::decode_attention_refusal(
            step_of(q, k_new, v_new, text, image, {PatternKind{kind}, 0, text_len, height, width, kernel_size}));
      },
      "q"_a, "k_new"_a, "v_new"_a, "text"_a, "image"_a, "kind"_a, "text_len"_a, "height"_a, "width"_a, "kernel_size"_a,
      "Why decode_attention would do nothing, or None.");
  m.def(
      "sparse_attention_backward_refusal",
      [](const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, int kind,
         int64_t text_len, int64_t height, int64_t width, int64_t kernel_size) {
        const auto [batch, heads, seq, head_dim] = sizes_of(q);
        SparseAttentionBackward params{};
        params.dtype = q.dtype, params.batch = batch, params.heads = heads, params.head_dim = head_dim;
        params.pattern = {PatternKind{kind}, seq, text_len, height, width, kernel_size};
        params.grad_out = heads_of(grad_out), params.q = heads_of(q), params.k = heads_of(k), params.v = heads_of(v);
        params.out = heads_of(out);
        return cuda::sparse_attention_backward_refusal(params);
      },
      "grad_out"_a, "q"_a, "k"_a, "v"_a, "out"_a, "kind"_a, "text_len"_a, "height"_a, "width"_a, "kernel_size"_a,
      "Why sparse_attention_backward would do nothing, or None.");
#else
  m.def(
      "sparse_attention_backward",
      [](const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& dq, const Tensor& dk,
         const Tensor& dv, int kind, int64_t text_len, int64_t height, int64_t width, int64_t kernel_size, float scale,
         uintptr_t executor) {
        const auto [batch, heads, seq, head_dim] = sizes_of(q);
        const Pattern pattern{PatternKind{kind}, seq, text_len, height, width, kernel_size};
        const SparseAttentionBackward params{q.dtype, batch, heads, head_dim, pattern, scale, heads_of(grad_out),
                                             heads_of(q), heads_of(k), heads_of(v), heads_of(dq), heads_of(dk),
                                             heads_of(dv), team_of(executor, sizes_of(q)), nullptr};
        DALLE_RUN(sparse_attention_backward, params, executor);
      },
      "grad_out"_a, "q"_a, "k"_a, "v"_a, "dq"_a, "dk"_a, "dv"_a, "kind"_a, "text_len"_a, "height"_a, "width"_a,
      "kernel_size"_a, "scale"_a, "executor"_a);

  // `text` and `image` are those of a KVCache. Of the image's keys `count` are seen: those in `slots`, or where that is
  // None the ones from `first` on.
  m.def(
      "decode_attention",
      [](const Tensor& q, const Tensor& k_new, const Tensor& v_new, const Tensor& text, const Tensor& image,
         const Tensor& out, int64_t text_keys, int64_t first, int64_t count, const Tensor& slots, int64_t new_key,
         float scale, uintptr_t executor) {
        const int64_t prompts = image.sizes[1], heads = image.sizes[2], samples = image.sizes[3];
        const int64_t head_dim = image.sizes[5], bytes = q.dtype == Dtype::float32 ? 4 : 2;
        const DecodeAttention params{q.dtype, prompts, samples, heads, head_dim, scale, token_heads(q),
                                     token_heads(k_new), token_heads(v_new), text.data,
                                     image.as<char>() + first * head_dim * bytes, text.sizes[3], image.sizes[4],
                                     text_keys, count, slots.as<const int32_t>(), new_key, out.data,
                                     threads_of(executor)};
        DALLE_RUN(decode_attention, params, executor);
      },
      "q"_a, "k_new"_a, "v_new"_a, "text"_a, "image"_a, "out"_a, "text_keys"_a, "first"_a, "count"_a, "slots"_a,
      "new_key"_a, "scale"_a, "executor"_a);
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
