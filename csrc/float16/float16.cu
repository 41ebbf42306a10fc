#include "common/cuda.h"
#include "common/tile.h"
#include "float16/codec_pack.h"
#include "float16/float16.h"

namespace dalle::cuda {
namespace {

using namespace plain;

constexpr int PACKS = 4;
constexpr int STRIDED_THREADS = 256;

template <Float16Format format>
struct Encode {
  bool nonfinite;

  template <class Output, class Element, int COUNT>
  __device__ __forceinline__ Pack<uint16_t, COUNT> apply(const Pack<Element, COUNT>& pack) {
    Pack<Code<format>, COUNT> codes;
    if constexpr (sizeof(Element) == sizeof(double)) {
#pragma unroll
      for (int i = 0; i < COUNT; ++i) codes.elements[i].bits = of_bits(encodable_bits(pack.elements[i]));
    } else {
      float numbers[COUNT];
      numbers_of(pack, numbers);
#pragma unroll
      for (const float number : numbers) nonfinite |= is_nonfinite(bits_of(number));
      codes = rounded_pack<Code<format>>(numbers);
    }
    return reinterpret_cast<const Pack<uint16_t, COUNT>&>(codes);
  }

 private:
  __device__ __forceinline__ uint16_t of_bits(uint64_t bits) {
    nonfinite |= is_nonfinite(bits);
    return encode_bits<format>(bits);
  }
};

template <Float16Format format>
struct Decode {
  template <class Element, class Input, int COUNT>
  __device__ __forceinline__ Pack<Element, COUNT> apply(const Pack<Input, COUNT>& codes) {
    float numbers[COUNT];
    numbers_of(reinterpret_cast<const Pack<Code<format>, COUNT>&>(codes), numbers);
    return rounded_pack<Element>(numbers);
  }
};

// A tile a block. Every thread that stores to the flag stores the same, so the outcome does not depend on their order.
template <Float16Format format, class Element>
__global__ void __launch_bounds__(TILE_THREADS) encode_contiguous(const Element* input, uint16_t* codes,
                                                                  uint8_t* nonfinite, int64_t count) {
  Encode<format> encode{false};
  map_tile<Tiles<PACKS, Element>>(encode, blockIdx.x, count, input, codes);
  if (encode.nonfinite) *nonfinite = 1;
}

template <Float16Format format, class Element>
__global__ void __launch_bounds__(TILE_THREADS) decode_contiguous(const uint16_t* codes, Element* output,
                                                                  int64_t count) {
  Decode<format> decode;
  map_tile<Tiles<PACKS, Element>>(decode, blockIdx.x, count, codes, output);
}

// Where the elements of a strided tensor lie one by one.
__device__ int64_t place_of(const Strided& shape, int64_t row, int64_t index) {
  return row_offset(shape, index / row) + (index % row) * shape.strides[shape.dims - 1];
}
__device__ int64_t global_thread() { return static_cast<int64_t>(blockIdx.x) * STRIDED_THREADS + threadIdx.x; }
__device__ int64_t grid_threads() { return static_cast<int64_t>(gridDim.x) * STRIDED_THREADS; }

template <Float16Format format, class Element>
__global__ void __launch_bounds__(STRIDED_THREADS) encode_strided(const Element* __restrict__ input,
                                                                  const __grid_constant__ Strided shape,
                                                                  uint16_t* __restrict__ codes, uint8_t* nonfinite,
                                                                  int64_t count) {
  Encode<format> encode{false};
  const int64_t row = row_length(shape);
  for (int64_t i = global_thread(); i < count; i += grid_threads()) {
    codes[i] = encode.template apply<uint16_t>(Pack<Element, 1>{{input[place_of(shape, row, i)]}}).elements[0];
  }
  if (encode.nonfinite) *nonfinite = 1;
}

template <Float16Format format, class Element>
__global__ void __launch_bounds__(STRIDED_THREADS) decode_strided(const uint16_t* __restrict__ codes,
                                                                  const __grid_constant__ Strided shape,
                                                                  Element* __restrict__ output, int64_t count) {
  Decode<format> decode;
  const int64_t row = row_length(shape);
  for (int64_t i = global_thread(); i < count; i += grid_threads()) {
    output[i] = decode.template apply<Element>(Pack<uint16_t, 1>{{codes[place_of(shape, row, i)]}}).elements[0];
  }
}

template <class Element>
unsigned tiles_of(int64_t count) {
  return static_cast<unsigned>(Tiles<PACKS, Element>::covering(count));
}

template <Float16Format format, class Element>
const char* encode_all(const Float16Encode& p, cudaStream_t stream) {
  const char* cleared = status(cudaMemsetAsync(p.nonfinite, 0, 1, stream));
  const Strided m = merged(p.shape);
  const int64_t count = element_count(m);
  if (cleared != nullptr || count == 0) return cleared;
  const Element* input = static_cast<const Element*>(p.input);
  if (is_contiguous(m)) {
    return launch(encode_contiguous<format, Element>, tiles_of<Element>(count), TILE_THREADS, stream, input, p.codes,
                  p.nonfinite, count);
  }
  return launch(encode_strided<format, Element>, grid_size(count, STRIDED_THREADS), STRIDED_THREADS, stream, input, m,
                p.codes, p.nonfinite, count);
}

template <Float16Format format, class Element>
const char* decode_all(const Float16Decode& p, cudaStream_t stream) {
  const Strided m = merged(p.shape);
  const int64_t count = element_count(m);
  if (count == 0) return nullptr;
  Element* output = static_cast<Element*>(p.output);
  if (is_contiguous(m)) {
    return launch(decode_contiguous<format, Element>, tiles_of<Element>(count), TILE_THREADS, stream, p.codes, output,
                  count);
  }
  return launch(decode_strided<format, Element>, grid_size(count, STRIDED_THREADS), STRIDED_THREADS, stream, p.codes, m,
                output, count);
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
