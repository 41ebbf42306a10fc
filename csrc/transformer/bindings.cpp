#include <array>
#include <tuple>

#include "common/module.h"
#include "transformer/transformer.h"

using namespace dalle;
using namespace pybind11::literals;

namespace {

AffineWeights affine_of(const uintptr_t* weights) { return {pointer<void>(weights[0]), pointer<void>(weights[1])}; }

TransformerLayer layer_of(const uintptr_t* weights) {
  TransformerLayer layer{};
  layer.attention_norm = affine_of(weights), layer.query_key_value = affine_of(weights + 2);
  layer.projection = affine_of(weights + 4), layer.mlp_norm = affine_of(weights + 6);
  layer.expansion = affine_of(weights + 8), layer.contraction = affine_of(weights + 10);
  return layer;
}

// Prompts, samples of each, heads, head_dim, dim, hidden and text_capacity.
using Sizes = std::array<int64_t, 7>;

DecodeLayers layers_of(int dtype, const Sizes& sizes, const std::vector<TransformerLayer>& layers) {
  DecodeLayers params{};
  params.dtype = Dtype{dtype};
  params.prompts = sizes[0], params.samples = sizes[1], params.heads = sizes[2], params.head_dim = sizes[3];
  params.dim = sizes[4], params.hidden = sizes[5], params.text_capacity = sizes[6];
  params.layers = layers.data(), params.count = static_cast<int64_t>(layers.size());
  return params;
}

}  // namespace

#if defined(DALLE_MODULE_CUDA)
namespace {

// A layer's cache: the addresses of its text and image, the image's room for keys, and the pattern's kind.
using CacheTuple = std::tuple<uintptr_t, uintptr_t, int64_t, int>;
// The pattern's text_len, height, width and kernel_size.
using Four = std::array<int64_t, 4>;

std::vector<TransformerLayer> all_layers(const std::vector<uintptr_t>& weights, const std::vector<CacheTuple>& caches,
                                         const Four& pattern) {
  std::vector<TransformerLayer> layers;
  for (const auto& [text, image, image_capacity, kind] : caches) {
    TransformerLayer layer = layer_of(weights.data() + 12 * layers.size());
    layer.text = pointer<void>(text), layer.image = pointer<void>(image), layer.image_capacity = image_capacity;
    layer.pattern = {PatternKind{kind}, 0, pattern[0], pattern[1], pattern[2], pattern[3]};
    layers.push_back(layer);
  }
  return layers;
}

}  // namespace

DALLE_BINDINGS(transformer, m) {
  // `place` is the address of a number of 8 bytes or 4, or 0.
  m.def(
      "decode_layers",
      [](int dtype, const Sizes& sizes, float scale, float epsilon, const std::vector<uintptr_t>& weights,
         const std::vector<CacheTuple>& caches, const Four& pattern, int64_t position, uintptr_t place, bool wide_place,
         uintptr_t x, uintptr_t scratch, uintptr_t executor) {
        const auto layers = all_layers(weights, caches, pattern);
        DecodeLayers params = layers_of(dtype, sizes, layers);
        params.scale = scale, params.epsilon = epsilon, params.x = pointer<void>(x);
        params.position = position, params.place = pointer<void>(place), params.wide_place = wide_place;
        params.scratch = pointer<void>(scratch);
        DALLE_RUN(decode_layers, params, executor);
      },
      "dtype"_a, "sizes"_a, "scale"_a, "epsilon"_a, "weights"_a, "caches"_a, "pattern"_a, "position"_a, "place"_a,
      "wide_place"_a, "x"_a, "scratch"_a, "executor"_a);
  m.def(
      "decode_layers_refusal",
      [](int dtype, const Sizes& sizes, const std::vector<uintptr_t>& weights, const std::vector<CacheTuple>& caches,
         const Four& pattern) {
        const auto layers = all_layers(weights, caches, pattern);
        return cuda::decode_layers_refusal(layers_of(dtype, sizes, layers));
      },
      "dtype"_a, "sizes"_a, "weights"_a, "caches"_a, "pattern"_a, "Why decode_layers would do nothing, or None.");
}
#else
namespace {

// A layer's cache: the addresses of its text and image, the keys seen of the text, and of the image the room for keys,
// the keys seen, the address of their slots (or 0), and which of all seen keys is the new one.
using CacheTuple = std::tuple<uintptr_t, uintptr_t, int64_t, int64_t, int64_t, uintptr_t, int64_t>;

TransformerLayer layer_of(const uintptr_t* weights, const CacheTuple& cache) {
  TransformerLayer layer = layer_of(weights);
  const auto [text, image, text_keys, image_capacity, image_keys, image_slots, new_key] = cache;
  layer.text = pointer<void>(text), layer.image = pointer<void>(image), layer.text_keys = text_keys;
  layer.image_capacity = image_capacity, layer.image_keys = image_keys;
  layer.image_slots = pointer<const int32_t>(image_slots), layer.new_key = new_key;
  return layer;
}

}  // namespace

DALLE_BINDINGS(transformer, m) {
  m.def(
      "decode_layers",
      [](int dtype, const Sizes& sizes, float scale, float epsilon, const std::vector<uintptr_t>& weights,
         const std::vector<CacheTuple>& caches, uintptr_t x, uintptr_t executor) {
        std::vector<TransformerLayer> layers;
        for (size_t i = 0; i < caches.size(); ++i) layers.push_back(layer_of(weights.data() + 12 * i, caches[i]));
        DecodeLayers params = layers_of(dtype, sizes, layers);
        params.scale = scale, params.epsilon = epsilon, params.x = pointer<void>(x);
        params.threads = threads_of(executor);
        DALLE_RUN(decode_layers, params, executor);
      },
      "dtype"_a, "sizes"_a, "scale"_a, "epsilon"_a, "weights"_a, "caches"_a, "x"_a, "executor"_a);
}
#endif
