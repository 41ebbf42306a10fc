// A decode step through a stack of layers: the kernels of the attention and linear families in turn, and between them
// layer normalization, GELU and the residual sums.
#include "transformer/transformer.h"

#include <cstdlib>

#include "common/gelu.h"
#include "common/parallel.h"
#include "linear/linear.h"

namespace dalle::DALLE_ISA_NAMESPACE {
namespace {

constexpr int64_t WIDTH = Vector::width;
constexpr int64_t GRAIN = 4096;  // elements that are worth a thread

template <class T>
void layer_norm(const T* x, const AffineWeights& p, int64_t rows, int64_t dim, float epsilon, int threads, T* out) {
  const T *weight = static_cast<const T*>(p.weight), *bias = static_cast<const T*>(p.bias);
  parallel_for(rows, (GRAIN + dim - 1) / dim, threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* row = x + r * dim;
      Vector sum = broadcast(0.0f), squares = sum;
      for (int64_t d = 0; d < dim; d += WIDTH) sum = sum + load_first(row + d, dim - d);
      const Vector mean = broadcast(sum_of_lanes(sum) / static_cast<float>(dim));
      const auto centred = [&](int64_t d) { return load_first(row + d, dim - d) - mean; };
      for (int64_t d = 0; d < dim; d += WIDTH) {
        const Vector all = centred(d);
        const uint32_t lanes = dim - d >= WIDTH ? ~0u : (1u << (dim - d)) - 1;
        const Vector c = select(lanes, all, broadcast(0.0f));
        squares = multiply_add(c, c, squares);
      }
      const float variance = sum_of_lanes(squares) / static_cast<float>(dim);
      const Vector factor = broadcast(1.0f / __builtin_sqrtf(variance + epsilon));
      for (int64_t d = 0; d < dim; d += WIDTH) {
        const int64_t left = dim - d;
        const Vector y = multiply_add(centred(d) * factor, load_first(weight + d, left), load_first(bias + d, left));
        store_first(out + r * dim + d, left, y);
      }
    }
  });
}

template <class T>
void apply_gelu(T* x, int64_t count, int threads) {
  parallel_for((count + WIDTH - 1) / WIDTH, GRAIN / WIDTH, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * WIDTH; i < end * WIDTH; i += WIDTH) {
      store_first(x + i, count - i, gelu(load_first(x + i, count - i)));
    }
  });
}

template <class T>
void add(const T* branch, int64_t count, T* x) {
  for (int64_t i = 0; i < count; i += WIDTH) {
    store_first(x + i, count - i, load_first(x + i, count - i) + load_first(branch + i, count - i));
  }
}

template <class T>
struct Stack {
  const DecodeLayers& p;
  int64_t rows, heads_width;
  T *normed, *wide, *attended;  // [rows, dim], [rows, the widest], [rows, heads_width]

  const char* multiply(const AffineWeights& layer, const T* x, int64_t inputs, int64_t outputs, T* out) const {
    return linear(
        {p.dtype, p.dtype, rows, inputs, outputs, x, inputs, layer.weight, inputs, layer.bias, out, p.threads});
  }

  const char* attend(const TransformerLayer& layer) const {
    const auto third = [&](int64_t i) { return TokenHeads{wide + i * heads_width, 3 * heads_width, p.head_dim, 1}; };
    return decode_attention({p.dtype, p.prompts, p.samples, p.heads, p.head_dim, p.scale, third(0), third(1), third(2),
                             layer.text, layer.image, p.text_capacity, layer.image_capacity, layer.text_keys,
                             layer.image_keys, layer.image_slots, layer.new_key, attended, p.threads});
  }

  const char* run(const TransformerLayer& layer) const {
    T* x = static_cast<T*>(p.x);
    const char* status = nullptr;
    layer_norm(x, layer.attention_norm, rows, p.dim, p.epsilon, p.threads, normed);
    if ((status = multiply(layer.query_key_value, normed, p.dim, 3 * heads_width, wide)) != nullptr) return status;
    if ((status = attend(layer)) != nullptr) return status;
    if ((status = multiply(layer.projection, attended, heads_width, p.dim, normed)) != nullptr) return status;
    add(normed, rows * p.dim, x);
    layer_norm(x, layer.mlp_norm, rows, p.dim, p.epsilon, p.threads, normed);
    if ((status = multiply(layer.expansion, normed, p.dim, p.hidden, wide)) != nullptr) return status;
    apply_gelu(wide, rows * p.hidden, p.threads);
    if ((status = multiply(layer.contraction, wide, p.hidden, p.dim, normed)) != nullptr) return status;
    add(normed, rows * p.dim, x);
    return nullptr;
  }
};

template <class T>
const char* decode(const DecodeLayers& p) {
  const int64_t rows = p.prompts * p.samples, heads_width = p.heads * p.head_dim;
  const int64_t widest = 3 * heads_width > p.hidden ? 3 * heads_width : p.hidden;
  T* scratch = static_cast<T*>(malloc(rows * (p.dim + widest + heads_width) * sizeof(T)));
  if (scratch == nullptr) return "not enough memory for the activations of a layer";
  T *wide = scratch + rows * p.dim, *attended = wide + rows * widest;
  const Stack<T> stack{p, rows, heads_width, scratch, wide, attended};
  const char* status = nullptr;
  for (int64_t i = 0; i < p.count && status == nullptr; ++i) status = stack.run(p.layers[i]);
  free(scratch);
  return status;
}

}  // namespace

const char* decode_layers(const DecodeLayers& p) {
  switch (p.dtype) {
    case Dtype::float32: return decode<float>(p);
    case Dtype::float16: return decode<Half>(p);
    case Dtype::bfloat16: return decode<BFloat16>(p);
    default: return "expected float32, float16 or bfloat16";
  }
}

}  // namespace dalle::DALLE_ISA_NAMESPACE
