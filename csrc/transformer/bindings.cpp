#include <array>
#include <tuple>

#include "common/module.h"
#include "transformer/transformer.h"

using namespace dalle;
using namespace pybind11::literals;

namespace {

// A layer's cache: the addresses of its text and image, the keys seen of the text, and of the image the room for keys,
// the keys seen, the address of their slots (or 0), and which of all seen keys is the new one.
using CacheTuple = std::tuple<uintptr_t, uintptr_t, int64_t, int64_t, int64_t, uintptr_t, int64_t>;

TransformerLayer layer_of(const uintptr_t* weights, const CacheTuple& cache) {
  const auto affine = [&](int i) { return AffineWeights{pointer<void>(weights[2 * i]), pointer<void>(weights[2 * i + 1])}; };
  const auto [text, image, text_keys, image_capacity, image_keys, image_slots, new_key] = cache;
  return {affine(0), affine(1), affine(2), affine(3), affine(4), affine(5), pointer<void>(text), pointer<void>(image),
          text_keys, image_capacity, image_keys, pointer<const int32_t>(image_slots), new_key};
}

}  // namespace

DALLE_BINDINGS(m) {
  m.def(
      "decode_layers",
      [](int dtype, const std::array<int64_t, 7>& sizes, float scale, float epsilon,
         const std::vector<uintptr_t>& weights, const std::vector<CacheTuple>& caches, uintptr_t x,
         uintptr_t executor) {
        std::vector<TransformerLayer> layers;
        for (size_t i = 0; i < caches.size(); ++i) layers.push_back(layer_of(weights.data() + 12 * i, caches[i]));
        const auto [prompts, samples, heads, head_dim, dim, hidden, text_capacity] = sizes;
        const DecodeLayers params{Dtype{dtype}, prompts, samples, heads, head_dim, dim, hidden, text_capacity, scale,
                                  epsilon, layers.data(), static_cast<int64_t>(layers.size()), pointer<void>(x),
                                  threads_of(executor)};
        DALLE_RUN(decode_layers, params, executor);
      },
      "dtype"_a, "sizes"_a, "scale"_a, "epsilon"_a, "weights"_a, "caches"_a, "x"_a, "executor"_a);
}
