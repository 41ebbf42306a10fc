// A decode step through a stack of layers on a GPU: five kernels a layer, each of which begins while the one before
// ends.
//
// Floor: bytes. At 4.3 TB/s (an H200) a layer of width 1920 takes 20.6 us in bfloat16, and the keys and values of 8
// rows of 30 heads 4 us more. Between the end of one kernel and the next one's first product lies at least a
// microsecond, in which nothing is read that depends on either; so weights, keys and values are asked for beforehand.
// No run has timed these kernels.
#include <algorithm>

#include "attention/decode.h"
#include "common/cuda.h"
#include "transformer/few_rows.h"
#include "transformer/transformer.h"

namespace dalle::cuda {
namespace {

// As many blocks as a large GPU has multiprocessors, if the outputs are enough. How they are cut changes no bit.
constexpr int ENOUGH_BLOCKS = 132;

template <class Element, bool NORM, bool GELU, int TILES>
const char* launch_tiles(const FewRows& p, bool chained, cudaStream_t stream) {
  using Block = FewRowsBlock<Element, NORM, GELU, TILES>;
  const auto kernel = few_rows<Element, NORM, GELU, TILES>;
  const int shared = Block::shared_bytes(p.inputs);
  const char* failed = status(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  if (failed != nullptr) return failed;
  const unsigned blocks = static_cast<unsigned>((p.outputs + TILES * 16 - 1) / (TILES * 16));
  return launch_chained(kernel, p, dim3(blocks), Block::THREADS, shared, chained, stream);
}

template <class Element, bool NORM, bool GELU>
const char* launch(const FewRows& p, bool chained, cudaStream_t stream) {
  const int tiles = (p.outputs + 15) / 16;
  if (tiles <= ENOUGH_BLOCKS) return launch_tiles<Element, NORM, GELU, 1>(p, chained, stream);
  if (tiles <= 2 * ENOUGH_BLOCKS) return launch_tiles<Element, NORM, GELU, 2>(p, chained, stream);
  if (tiles <= 3 * ENOUGH_BLOCKS) return launch_tiles<Element, NORM, GELU, 3>(p, chained, stream);
  return launch_tiles<Element, NORM, GELU, 4>(p, chained, stream);
}

int number(int64_t value) { return static_cast<int>(value); }

FewRows product(const DecodeLayers& p, const AffineWeights& weights, const void* x, int64_t inputs, void* out,
                int64_t outputs) {
  FewRows product{};
  product.weight = weights.weight, product.bias = weights.bias, product.x = x, product.out = out;
  product.rows = number(p.prompts * p.samples), product.inputs = number(inputs), product.outputs = number(outputs);
  product.epsilon = p.epsilon;
  return product;
}

FewRows normed(FewRows product, const AffineWeights& norm) {
  product.norm_weight = norm.weight, product.norm_bias = norm.bias;
  return product;
}

FewRows added(FewRows product, const void* residual) {
  product.residual = residual;
  return product;
}

DecodeStep step_of(const DecodeLayers& p, const TransformerLayer& layer, const char* joint, void* out) {
  const int64_t width = p.heads * p.head_dim;
  const auto token = [&](int part) { return TokenHeads{joint + 2 * part * width, 3 * width, p.head_dim, 1}; };
  DecodeStep step{};
  step.dtype = p.dtype, step.prompts = p.prompts, step.samples = p.samples, step.heads = p.heads;
  step.head_dim = p.head_dim, step.scale = p.scale, step.pattern = layer.pattern;
  step.q = token(0), step.k_new = token(1), step.v_new = token(2);
  step.text = layer.text, step.image = layer.image, step.image_capacity = layer.image_capacity, step.out = out;
  step.position = p.position, step.place = p.place, step.wide_place = p.wide_place, step.chained = true;
  return step;
}

// The first kernel waits for all work before it, whatever that writes; the others begin early.
template <class Element>
const char* run(const DecodeLayers& p, cudaStream_t stream) {
  const int64_t rows = p.prompts * p.samples, width = p.heads * p.head_dim;
  char* const joint = static_cast<char*>(p.scratch);
  char* const attended = joint + 2 * rows * 3 * width;
  char* const expanded = attended + 2 * rows * width;
  for (int64_t i = 0; i < p.count; ++i) {
    const TransformerLayer& layer = p.layers[i];
    const FewRows steps[] = {
        normed(product(p, layer.query_key_value, p.x, p.dim, joint, 3 * width), layer.attention_norm),
        added(product(p, layer.projection, attended, width, p.x, p.dim), p.x),
        normed(product(p, layer.expansion, p.x, p.dim, expanded, p.hidden), layer.mlp_norm),
        added(product(p, layer.contraction, expanded, p.hidden, p.x, p.dim), p.x),
    };
    const char* failed = launch<Element, true, false>(steps[0], i > 0, stream);
    if (failed == nullptr) failed = decode_attention(step_of(p, layer, joint, attended), stream);
    if (failed == nullptr) failed = launch<Element, false, false>(steps[1], true, stream);
    if (failed == nullptr) failed = launch<Element, true, true>(steps[2], true, stream);
    if (failed == nullptr) failed = launch<Element, false, false>(steps[3], true, stream);
    if (failed != nullptr) return failed;
  }
  return nullptr;
}

}  // namespace

const char* decode_layers_refusal(const DecodeLayers& p) {
  if (p.dtype != Dtype::bfloat16 && p.dtype != Dtype::float16) return "the kernel takes bfloat16 and float16";
  if (p.prompts * p.samples > MOST_ROWS) return "the kernel takes up to 8 rows";
  if (p.dim % 32 != 0 || p.hidden % 32 != 0 || p.hidden > 1 << 24 || p.heads > 1 << 18 ||
      p.dim > 1 << 24) {
    return "the kernel takes widths that are multiples of 32, up to 2^24";
  }
  const int needed = std::max(FewRowsBlock<BFloat16, true, true, 4>::shared_bytes(number(p.dim)),
                              FewRowsBlock<BFloat16, false, false, 4>::shared_bytes(number(p.hidden)));
  if (needed > most_shared()) return "the rows do not fit into the shared memory that this GPU gives a block";
  const auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  for (int64_t i = 0; i < p.count; ++i) {
    const TransformerLayer& layer = p.layers[i];
    for (const AffineWeights& weights : {layer.attention_norm, layer.query_key_value, layer.projection, layer.mlp_norm,
                                         layer.expansion, layer.contraction}) {
      const bool both = aligned(weights.weight) && aligned(weights.bias);
      if (!both) return "the kernel takes weights at multiples of 16 bytes";
    }
    const char* failed = decode_attention_refusal(step_of(p, layer, nullptr, nullptr));
    if (failed != nullptr) return failed;
  }
  return nullptr;
}

const char* decode_layers(const DecodeLayers& p, void* stream) {
  const char* failed = decode_layers_refusal(p);
  if (failed != nullptr || p.prompts * p.samples == 0) return failed;
  return p.dtype == Dtype::bfloat16 ? run<BFloat16>(p, static_cast<cudaStream_t>(stream))
                                    : run<Half>(p, static_cast<cudaStream_t>(stream));
}

}  // namespace dalle::cuda
