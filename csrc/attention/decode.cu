// Decoding on a GPU in one launch: where every row has keys of its own, and where samples share a text.
//
// Floor: decode.h. What stands in its way is latency: a step is a few microseconds, a read from memory one. So every
// thread asks for all its keys and values before it uses the first (of a head of 64 up to 320 keys at once), blocks are
// so small that all heads' are there at once, and nothing is joined by a second kernel.
#include "attention/decode_rows.h"
#include "attention/decode_samples.h"
#include "common/cuda.h"

namespace dalle::cuda {
namespace {

// From so many heads on, of all rows, 4 warps take a head, else 16: a number of its own, not the device's, so that the
// bits of a result do not depend on it.
constexpr int64_t MANY_HEADS = 133;

bool share_text(const DecodeStep& step) { return step.samples > 1 && step.pattern.text_len > 0; }

// What decode_samples asks for at its launch.
template <int HEAD_DIM>
constexpr int samples_bytes() {
  using Text = TextTiles<BFloat16, HEAD_DIM>;
  constexpr int TILES = Text::BYTES + Text::QUERIES_BYTES;
  return TILES > Text::SUMS_BYTES ? TILES : Text::SUMS_BYTES;
}

template <class Element, int HEAD_DIM>
const char* launch(const DecodeStep& step, const DecodeLaunch& p, cudaStream_t stream) {
  const int64_t heads = step.prompts * step.samples * step.heads;
  if (share_text(step)) {
    constexpr int SHARED = samples_bytes<HEAD_DIM>(), THREADS = TextTiles<Element, HEAD_DIM>::THREADS;
    const auto kernel = decode_samples<Element, HEAD_DIM, 8>;
    const char* failed = status(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED));
    if (failed != nullptr) return failed;
    const unsigned tiles = static_cast<unsigned>((step.samples + SAMPLES_OF_BLOCK - 1) / SAMPLES_OF_BLOCK);
    const dim3 blocks(static_cast<unsigned>(step.prompts * step.heads), tiles);
    return launch_chained(kernel, p, blocks, THREADS, SHARED, step.chained, stream);
  }
  const dim3 blocks(static_cast<unsigned>(heads));
  if (heads < MANY_HEADS) {
    return launch_chained(decode_rows<Element, HEAD_DIM, 16, 5>, p, blocks, 512, 0, step.chained, stream);
  }
  return launch_chained(decode_rows<Element, HEAD_DIM, 4, 10>, p, blocks, 128, 0, step.chained, stream);
}

template <class Element>
const char* launch(const DecodeStep& step, const DecodeLaunch& p, cudaStream_t stream) {
  return step.head_dim == 64 ? launch<Element, 64>(step, p, stream) : launch<Element, 128>(step, p, stream);
}

bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

}  // namespace

const char* decode_attention_refusal(const DecodeStep& step) {
  if (step.dtype != Dtype::bfloat16 && step.dtype != Dtype::float16) return "the kernel takes bfloat16 and float16";
  if (step.head_dim != 64 && step.head_dim != 128) return "the kernel takes a head_dim of 64 or 128";
  for (const TokenHeads& tensor : {step.q, step.k_new, step.v_new}) {
    if (tensor.element_stride != 1 || tensor.row_stride % 8 != 0 || tensor.head_stride % 8 != 0 ||
        !is_aligned(tensor.data)) {
      return "the kernel takes tensors whose address and strides are multiples of 16 bytes";
    }
  }
  if (!is_aligned(step.text) || !is_aligned(step.image)) return "the kernel takes a cache at multiples of 16 bytes";
  constexpr int64_t MOST = 1 << 24;
  const Pattern& pattern = step.pattern;
  if (step.prompts * step.samples * step.heads > MOST || step.samples > MOST / 16 || pattern.kernel_size > 1 << 10 ||
      pattern.text_len + pattern.height * pattern.width > MOST / step.head_dim) {
    return "the kernel takes up to 2^24 heads of all rows, and 2^24 / head_dim tokens";
  }
  const int needed = step.head_dim == 64 ? samples_bytes<64>() + static_cast<int>(sizeof(SamplesShared<64>))
                                         : samples_bytes<128>() + static_cast<int>(sizeof(SamplesShared<128>));
  if (share_text(step) && needed > most_shared()) {
    return "where samples share a text the kernel takes more shared memory than this GPU gives a block";
  }
  return nullptr;
}

const char* decode_attention(const DecodeStep& step, void* stream) {
  if (step.prompts * step.samples * step.heads == 0) return nullptr;
  const char* failed = decode_attention_refusal(step);
  if (failed != nullptr) return failed;
  const Pattern& pattern = step.pattern;
  const auto number = [](int64_t value) { return static_cast<int>(value); };
  DecodeLaunch p{};
  p.pattern = decode_pattern(pattern, step.image_capacity);
  p.q = step.q, p.k_new = step.k_new, p.v_new = step.v_new;
  p.text = step.text, p.image = step.image, p.out = step.out;
  p.place = step.place, p.wide_place = step.wide_place, p.position = number(step.position);
  p.prompts = number(step.prompts), p.samples = number(step.samples), p.heads = number(step.heads);
  p.exponent = step.scale * 1.4426950408889634f;
  return step.dtype == Dtype::bfloat16 ? launch<BFloat16>(step, p, static_cast<cudaStream_t>(stream))
                                       : launch<Half>(step, p, static_cast<cudaStream_t>(stream));
}

}  // namespace dalle::cuda
