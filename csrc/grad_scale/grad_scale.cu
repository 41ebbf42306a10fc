#include "grad_scale/grad_scale.h"

#include "common/cuda.h"
#include "common/tensor_table.h"
#include "common/tile.h"

namespace dalle::cuda {
namespace {

constexpr int PACKS = 4;

__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) < INFINITY; }
__device__ __forceinline__ bool is_finite(Half x) { return (x.bits & 0x7c00u) != 0x7c00u; }
__device__ __forceinline__ bool is_finite(BFloat16 x) { return (x.bits & 0x7f80u) != 0x7f80u; }

// 0 in place of what is not finite, which `seen` then tells.
template <class T, int COUNT>
__device__ __forceinline__ Pack<T, COUNT> filtered(const Pack<T, COUNT>& pack, bool& seen) {
  Pack<T, COUNT> out;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const bool finite = is_finite(pack.elements[i]);
    out.elements[i] = finite ? pack.elements[i] : T{};
    seen |= !finite;
  }
  return out;
}

struct Scale {
  float scale;
  bool seen;
  template <class Output, class Input, int COUNT>
  __device__ __forceinline__ Pack<Output, COUNT> apply(const Pack<Input, COUNT>& pack) {
    float numbers[COUNT];
    numbers_of(pack, numbers);
#pragma unroll
    for (float& number : numbers) number *= scale;
    return filtered(rounded_pack<Output>(numbers), seen);
  }
};

struct Unscale {
  float scale;
  bool seen;
  template <class Output, class Input, int COUNT>
  __device__ __forceinline__ Pack<Output, COUNT> apply(const Pack<Input, COUNT>& pack) {
    float numbers[COUNT];
    numbers_of(filtered(pack, seen), numbers);
#pragma unroll
    for (float& number : numbers) number = __fdiv_rn(number, scale);
    return rounded_pack<Output>(numbers);
  }
};

// A tile a block. Every thread that stores to the flag stores the same, so the outcome does not depend on their order.
template <class Job, class Input, class Output>
__global__ void __launch_bounds__(TILE_THREADS) cast(const __grid_constant__ TensorTable<GradScaleTensor> table,
                                                     const float* scale, uint8_t* nonfinite) {
  const int owner = table.owner(blockIdx.x);
  const GradScaleTensor& tensor = table.tensor[owner];
  Job job{*scale, false};
  map_tile<Tiles<PACKS, Input, Output>>(job, blockIdx.x - table.first_tile[owner], tensor.count,
                                        static_cast<const Input*>(tensor.input), static_cast<Output*>(tensor.output));
  if (job.seen) *nonfinite = 1;
}

template <class Job, class Input, class Output, class Params>
const char* run(const Params& p, cudaStream_t stream) {
  const char* error = status(cudaMemsetAsync(p.nonfinite, 0, 1, stream));
  if (error != nullptr) return error;
  return for_each_table<GradScaleTensor>(
      p.tensor_count, Tiles<PACKS, Input, Output>::ELEMENTS, [&](int64_t t) { return p.tensors[t]; },
      [&](const TensorTable<GradScaleTensor>& table, unsigned tiles) {
        return launch(cast<Job, Input, Output>, tiles, TILE_THREADS, stream, table, p.scale, p.nonfinite);
      });
}

template <class Input>
const char* scale_to_any(const ScaleCastFilter& p, cudaStream_t stream) {
  switch (p.output_dtype) {
    case Dtype::float32: return run<Scale, Input, float>(p, stream);
    case Dtype::float16: return run<Scale, Input, Half>(p, stream);
    case Dtype::bfloat16: return run<Scale, Input, BFloat16>(p, stream);
    default: return "unknown dtype";
  }
}

}  // namespace

const char* scale_cast_filter(const ScaleCastFilter& p, void* stream) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  switch (p.input_dtype) {
    case Dtype::float32: return scale_to_any<float>(p, s);
    case Dtype::float16: return scale_to_any<Half>(p, s);
    case Dtype::bfloat16: return scale_to_any<BFloat16>(p, s);
    default: return "unknown dtype";
  }
}

const char* filter_cast_unscale(const FilterCastUnscale& p, void* stream) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  switch (p.input_dtype) {
    case Dtype::float32: return run<Unscale, float, float>(p, s);
    case Dtype::float16: return run<Unscale, Half, float>(p, s);
    case Dtype::bfloat16: return run<Unscale, BFloat16, float>(p, s);
    default: return "unknown dtype";
  }
}

}  // namespace dalle::cuda
