#include <type_traits>

#include "common/cuda.h"
#include "float16/codec.h"
#include "float16/float16.h"

namespace dalle::cuda {
namespace {

using namespace plain;

constexpr int THREADS = 256;
constexpr int PER_THREAD = 8;  // contiguous elements a thread takes at a time: one 16-byte store of codes

template <class Element>
struct alignas(sizeof(Element) * PER_THREAD > 16 ? 16 : sizeof(Element) * PER_THREAD) Pack {
  Element elements[PER_THREAD];
};

__device__ int64_t global_thread() { return static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x; }
__device__ int64_t grid_threads() { return static_cast<int64_t>(gridDim.x) * THREADS; }

template <Float16Format format, class Element>
__device__ uint16_t encode_one(Element x, bool& nonfinite) {
  const auto bits = encodable_bits(x);
  nonfinite |= is_nonfinite(bits);
  return encode_bits<format>(bits);
}

// Every thread that stores to the flag stores the same, so the outcome does not depend on their order.
template <Float16Format format, class Element>
__global__ void __launch_bounds__(THREADS) encode_contiguous(const Element* __restrict__ input,
                                                             uint16_t* __restrict__ codes, uint8_t* nonfinite_flag,
                                                             int64_t count, bool aligned) {
  bool nonfinite = false;
  const int64_t packs = aligned ? count / PER_THREAD : 0;
  for (int64_t i = global_thread(); i < packs; i += grid_threads()) {
    const Pack<Element> in = reinterpret_cast<const Pack<Element>*>(input)[i];
    Pack<uint16_t> out;
#pragma unroll
    for (int k = 0; k < PER_THREAD; ++k) out.elements[k] = encode_one<format>(in.elements[k], nonfinite);
    reinterpret_cast<Pack<uint16_t>*>(codes)[i] = out;
  }
  for (int64_t i = packs * PER_THREAD + global_thread(); i < count; i += grid_threads()) {
    codes[i] = encode_one<format>(input[i], nonfinite);
  }
  if (nonfinite) *nonfinite_flag = 1;
}

template <Float16Format format, class Element>
__global__ void __launch_bounds__(THREADS) encode_strided(const Element* __restrict__ input, Strided shape,
                                                          uint16_t* __restrict__ codes, uint8_t* nonfinite_flag,
                                                          int64_t count) {
  bool nonfinite = false;
  const int64_t row = row_length(shape), stride = shape.strides[shape.dims - 1];
  for (int64_t i = global_thread(); i < count; i += grid_threads()) {
    codes[i] = encode_one<format>(input[row_offset(shape, i / row) + (i % row) * stride], nonfinite);
  }
  if (nonfinite) *nonfinite_flag = 1;
}

template <Float16Format format, class Element>
__global__ void __launch_bounds__(THREADS) decode_contiguous(const uint16_t* __restrict__ codes,
                                                             Element* __restrict__ output, int64_t count,
                                                             bool aligned) {
  const int64_t packs = aligned ? count / PER_THREAD : 0;
  for (int64_t i = global_thread(); i < packs; i += grid_threads()) {
    const Pack<uint16_t> in = reinterpret_cast<const Pack<uint16_t>*>(codes)[i];
    Pack<Element> out;
#pragma unroll
    for (int k = 0; k < PER_THREAD; ++k) from_float(decode_code<format>(in.elements[k]), out.elements[k]);
    reinterpret_cast<Pack<Element>*>(output)[i] = out;
  }
  for (int64_t i = packs * PER_THREAD + global_thread(); i < count; i += grid_threads()) {
    from_float(decode_code<format>(codes[i]), output[i]);
  }
}

template <Float16Format format, class Element>
__global__ void __launch_bounds__(THREADS) decode_strided(const uint16_t* __restrict__ codes, Strided shape,
                                                          Element* __restrict__ output, int64_t count) {
  const int64_t row = row_length(shape), stride = shape.strides[shape.dims - 1];
  for (int64_t i = global_thread(); i < count; i += grid_threads()) {
    from_float(decode_code<format>(codes[row_offset(shape, i / row) + (i % row) * stride]), output[i]);
  }
}

bool is_aligned(const void* a, const void* b) {
  return ((reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b)) & 15) == 0;
}

template <Float16Format format, class Element>
const char* encode_all(const Float16Encode& p, cudaStream_t stream) {
  const char* cleared = status(cudaMemsetAsync(p.nonfinite, 0, 1, stream));
  const Strided m = merged(p.shape);
  const int64_t count = element_count(m);
  if (cleared != nullptr || count == 0) return cleared;
  const Element* input = static_cast<const Element*>(p.input);
  if (is_contiguous(m)) {
    encode_contiguous<format><<<grid_size((count + PER_THREAD - 1) / PER_THREAD, THREADS), THREADS, 0, stream>>>(
        input, p.codes, p.nonfinite, count, is_aligned(input, p.codes));
  } else {
    encode_strided<format>
        <<<grid_size(count, THREADS), THREADS, 0, stream>>>(input, m, p.codes, p.nonfinite, count);
  }
  return launch_status();
}

template <Float16Format format, class Element>
const char* decode_all(const Float16Decode& p, cudaStream_t stream) {
  const Strided m = merged(p.shape);
  const int64_t count = element_count(m);
  if (count == 0) return nullptr;
  Element* output = static_cast<Element*>(p.output);
  if (is_contiguous(m)) {
    decode_contiguous<format><<<grid_size((count + PER_THREAD - 1) / PER_THREAD, THREADS), THREADS, 0, stream>>>(
        p.codes, output, count, is_aligned(p.codes, output));
  } else {
    decode_strided<format><<<grid_size(count, THREADS), THREADS, 0, stream>>>(p.codes, m, output, count);
  }
  return launch_status();
}

template <Float16Format format>
const char* encode_any(const Float16Encode& p, cudaStream_t stream) {
  switch (p.dtype) {
    case Dtype::float32: return encode_all<format, float>(p, stream);
    case Dtype::float16: return encode_all<format, Half>(p, stream);
    case Dtype::bfloat16: return encode_all<format, BFloat16>(p, stream);
    case Dtype::float64: return encode_all<format, double>(p, stream);
  }
  return "unknown dtype";
}

template <Float16Format format>
const char* decode_any(const Float16Decode& p, cudaStream_t stream) {
  switch (p.dtype) {
    case Dtype::float32: return decode_all<format, float>(p, stream);
    case Dtype::float16: return decode_all<format, Half>(p, stream);
    case Dtype::bfloat16: return decode_all<format, BFloat16>(p, stream);
    case Dtype::float64: return decode_all<format, double>(p, stream);
  }
  return "unknown dtype";
}

}  // namespace

const char* float16_encode(const Float16Encode& p, void* stream) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  return p.format == Float16Format::fp169 ? encode_any<Float16Format::fp169>(p, s)
                                          : encode_any<Float16Format::fp0610>(p, s);
}

const char* float16_decode(const Float16Decode& p, void* stream) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  return p.format == Float16Format::fp169 ? decode_any<Float16Format::fp169>(p, s)
                                          : decode_any<Float16Format::fp0610>(p, s);
}

}  // namespace dalle::cuda
