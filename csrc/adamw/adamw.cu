#include "adamw/adamw.h"

#include "adamw/rounding_pack.h"
#include "common/cuda.h"
#include "common/tensor_table.h"
#include "common/tile.h"
#include "float16/codec_pack.h"

namespace dalle::cuda {
namespace {

// What the update of one tensor multiplies with; the same for every element.
struct Factors {
  float gradient_factor, mean_rate, variance_rate, inverse_root_correction, minus_step_size;
  uint32_t row[2];  // of the noise of stochastic rounding, its low and its high word
};
static_assert(sizeof(Factors) == AdamW16Step::FACTORS * sizeof(float), "what the caller allocates");

struct Settings {
  float beta1, beta2, max_variance, eps, decay;
  uint64_t rounding_seed;
};

// One thread a tensor counts its step and works out its factors, in double as the reference does. Nobody else reads the
// count, and a GPU that is slow in double does little of it.
struct Counted {
  float* step;
  int64_t count;  // 1, so that no tensor is left out
  int64_t number;
};
constexpr int COUNT_THREADS = 32;

__device__ double power_of_two(double x) {
  int exponent;
  frexp(x, &exponent);
  return ldexp(1.0, min(max(exponent, -126), 126));
}

__global__ void __launch_bounds__(COUNT_THREADS) count_steps(const __grid_constant__ TensorTable<Counted> table,
                                                             Factors* factors, double lr, double beta1, double beta2,
                                                             const float* grad_scale, const uint8_t* found_nonfinite) {
  const int t = blockIdx.x * COUNT_THREADS + threadIdx.x;
  if (t >= table.tensors) return;
  const float step = *table.tensor[t].step;
  const double count = step + 1.0, whole_scale = grad_scale == nullptr ? 1.0 : *grad_scale;
  const uint64_t row = (static_cast<uint64_t>(table.tensor[t].number) << 32) + static_cast<uint64_t>(step) + 1;
  // Gradients are divided by the power of two first, which rounds nothing.
  const double power = power_of_two(whole_scale), scale = whole_scale / power;
  factors[t] = {static_cast<float>(1.0 / power), static_cast<float>((1.0 - beta1) / scale),
                static_cast<float>((1.0 - beta2) / (scale * scale)),
                static_cast<float>(1.0 / sqrt(1.0 - pow(beta2, count))),
                static_cast<float>(-lr / (1.0 - pow(beta1, count))),
                {static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32)}};
  if (found_nonfinite == nullptr || *found_nonfinite == 0) *table.tensor[t].step = step + 1.0f;
}

// One tensor in the table of the launch that updates it.
struct Updated {
  void* parameter;
  const void* gradient;
  void* first_moment;
  void* second_moment;
  const Factors* factors;
  int64_t count;
};

// The root and the quotient rounded to nearest as the compiler's own are, in its own steps but for its branches into
// rare cases, which keep an element waiting for the one before. Where `usual` becomes false they are not to be trusted:
// a root of less than 2^-100 that is not 0, a quotient of less than 2^-60 that is not 0, or one that is not finite.
struct Usual {
  bool usual = true;

  __device__ __forceinline__ float root(float x) {
    usual &= __float_as_uint(x) - 1u >= __float_as_uint(0x1p-100f) - 1u;
    const float inverse = fast_reciprocal_root(fmaxf(x, 0x1p-100f)), root = __fmul_rn(x, inverse);
    return __fmaf_rn(__fmaf_rn(-root, root, x), __fmul_rn(inverse, 0.5f), root);
  }
  __device__ __forceinline__ float quotient(float x, float y) {
    usual &= 2u * __float_as_uint(x) - 1u >= 2u * __float_as_uint(0x1p-60f) - 1u;
    const float rough = fast_reciprocal(y), inverse = __fmaf_rn(rough, __fmaf_rn(-y, rough, 1.0f), rough);
    const float near = __fmul_rn(x, inverse), quotient = __fmaf_rn(inverse, __fmaf_rn(-y, near, x), near);
    usual &= fabsf(quotient) < INFINITY;
    return quotient;
  }
};

struct Exact {
  static constexpr bool usual = true;
  __device__ __forceinline__ float root(float x) { return __fsqrt_rn(x); }
  __device__ __forceinline__ float quotient(float x, float y) { return __fdiv_rn(x, y); }
};

// The arithmetic of dalle_kernels/adamw/reference.py: what is not called fused is rounded on its own.
struct Update {
  Factors factors;
  Settings settings;

  // Takes the old parameter, gradient and moments and leaves the new ones.
  template <class Roots>
  __device__ __forceinline__ void apply(Roots& roots, float& parameter, float gradient, float& mean,
                                        float& variance) const {
    gradient = __fmul_rn(gradient, factors.gradient_factor);
    mean = __fmaf_rn(gradient, factors.mean_rate, __fmul_rn(mean, settings.beta1));
    const float square =
        __fmaf_rn(__fmul_rn(gradient, factors.variance_rate), gradient, __fmul_rn(variance, settings.beta2));
    variance = fminf(square, settings.max_variance);  // NaN: the largest
    const float root = __fmaf_rn(roots.root(variance), factors.inverse_root_correction, settings.eps);
    parameter =
        __fmaf_rn(factors.minus_step_size, roots.quotient(mean, root), __fmul_rn(parameter, settings.decay));
  }
};

// What rounds the parameters of a tile, whose first element is number `first` of its tensor.
struct Nearest {
  __device__ __forceinline__ Nearest(const Update&, int64_t) {}

  // Those from number `place` of the tile on.
  template <class T, int COUNT>
  __device__ __forceinline__ Pack<T, COUNT> round(const float (&numbers)[COUNT], int) const {
    return rounded_pack<T>(numbers);
  }
};

class Stochastic {
 public:
  __device__ __forceinline__ Stochastic(const Update& update, int64_t first)
      : philox_(update.settings.rounding_seed, uint64_t{update.factors.row[1]} << 32 | update.factors.row[0],
                PHILOX_USE_ROUNDING),
        first_group_(static_cast<uint32_t>(first / PHILOX_WORDS)) {}

  template <class T, int COUNT>
  __device__ __forceinline__ Pack<T, COUNT> round(const float (&numbers)[COUNT], int place) const {
    uint32_t words[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; i += PHILOX_WORDS) {
      uint32_t four[PHILOX_WORDS];
      philox_.words(first_group_ + (place + i) / PHILOX_WORDS, four);
      if constexpr (COUNT == 1) {
        words[0] = place & 2 ? (place & 1 ? four[3] : four[2]) : place & 1 ? four[1] : four[0];
      } else {
#pragma unroll
        for (int j = 0; j < PHILOX_WORDS; ++j) words[i + j] = four[j];
      }
    }
    return stochastic_pack<T>(numbers, words);
  }

 private:
  PhiloxRow philox_;
  uint32_t first_group_;
};

// The arrays of one tensor, and elements of theirs.
template <class Parameter, class Gradient, class Mean, class Variance>
struct Arrays {
  Parameter* parameters;
  const Gradient* gradients;
  Mean* means;
  Variance* variances;

  template <int COUNT>
  struct Elements {
    Pack<Parameter, COUNT> parameter;
    Pack<Gradient, COUNT> gradient;
    Pack<Mean, COUNT> mean;
    Pack<Variance, COUNT> variance;
  };

  template <int COUNT>
  __device__ __forceinline__ Elements<COUNT> load(int index) const {
    return {load_pack<COUNT>(parameters, index), load_pack<COUNT>(gradients, index), load_pack<COUNT>(means, index),
            load_pack<COUNT>(variances, index)};
  }

  // Whether the elements are updated; else they are as they were.
  template <class Roots, class Rounding, int COUNT>
  __device__ __forceinline__ bool update(const Update& update, const Rounding& rounding,
                                         const Elements<COUNT>& elements, int index) const {
    float p[COUNT], g[COUNT], m[COUNT], v[COUNT];
    numbers_of(elements.parameter, p);
    numbers_of(elements.gradient, g);
    numbers_of(elements.mean, m);
    numbers_of(elements.variance, v);
    Roots roots;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) update.apply(roots, p[i], g[i], m[i], v[i]);
    if (roots.usual) {
      store_pack(parameters, index, rounding.template round<Parameter>(p, index * COUNT));
      store_pack(means, index, rounded_pack<Mean>(m));
      store_pack(variances, index, rounded_pack<Variance>(v));
    }
    return roots.usual;
  }

  // One by one, whatever their values.
  template <class Rounding>
  __device__ __forceinline__ void update_each(const Update& factors, const Rounding& rounding, int begin, int end,
                                              int step) const {
#pragma unroll 1
    for (int i = begin; i < end; i += step) update<Exact>(factors, rounding, load<1>(i), i);
  }
};

// 8 elements a thread, in as many packs as that takes.
template <class... T>
using Shape = Tiles<8 / pack_size<T...>(), T...>;

// A tile a block.
template <class Rounding, class Parameter, class Gradient, class Mean, class Variance>
__global__ void __launch_bounds__(TILE_THREADS) update(const __grid_constant__ TensorTable<Updated> table,
                                                       Settings settings, const uint8_t* found_nonfinite) {
  using Tile = Shape<Parameter, Gradient, Mean, Variance>;
  using Run = Arrays<Parameter, Gradient, Mean, Variance>;
  constexpr int COUNT = Tile::COUNT, PACKS = Tile::PACKS;
  if (found_nonfinite != nullptr && *found_nonfinite != 0) return;
  const int owner = table.owner(blockIdx.x), thread = threadIdx.x;
  const Updated& tensor = table.tensor[owner];
  const int64_t first = (blockIdx.x - table.first_tile[owner]) * Tile::ELEMENTS, left = tensor.count - first;
  const Run run{static_cast<Parameter*>(tensor.parameter) + first,
                static_cast<const Gradient*>(tensor.gradient) + first,
                static_cast<Mean*>(tensor.first_moment) + first,
                static_cast<Variance*>(tensor.second_moment) + first};
  const int here = left < Tile::ELEMENTS ? static_cast<int>(left) : Tile::ELEMENTS;
  const int packs = are_aligned(run.parameters, run.gradients, run.means, run.variances) ? here / COUNT : 0;

  typename Run::template Elements<COUNT> elements[PACKS];
#pragma unroll
  for (int p = 0; p < PACKS; ++p) {
    const int index = p * TILE_THREADS + thread;
    if (index < packs) elements[p] = run.template load<COUNT>(index);
  }
  const Update factors{*tensor.factors, settings};
  const Rounding rounding(factors, first);
  bool left_out[PACKS];
#pragma unroll
  for (int p = 0; p < PACKS; ++p) {
    const int index = p * TILE_THREADS + thread;
    left_out[p] = index < packs && !run.template update<Usual>(factors, rounding, elements[p], index);
  }
#pragma unroll
  for (int p = 0; p < PACKS; ++p) {
    const int begin = (p * TILE_THREADS + thread) * COUNT;
    if (left_out[p]) run.update_each(factors, rounding, begin, begin + COUNT, 1);
  }
  // What fills no pack, or all of arrays that are not aligned.
  run.update_each(factors, rounding, packs * COUNT + thread, here, TILE_THREADS);
}

const char* count_all(const AdamW16Step& p, cudaStream_t stream) {
  Factors* factors = reinterpret_cast<Factors*>(p.factors);
  return for_each_table<Counted>(
      p.tensor_count, 1,
      [&](int64_t t) { return Counted{p.tensors[t].step, 1, p.tensors[t].number}; },
      [&](const TensorTable<Counted>& table, unsigned tensors) {
        const char* error = launch(count_steps, (tensors + COUNT_THREADS - 1) / COUNT_THREADS, COUNT_THREADS, stream,
                                   table, factors, p.lr, p.beta1, p.beta2, p.grad_scale, p.found_nonfinite);
        factors += tensors;
        return error;
      });
}

template <class Rounding, class Parameter, class Gradient, class Mean, class Variance>
const char* update_all(const AdamW16Step& p, cudaStream_t stream) {
  const Factors* factors = reinterpret_cast<const Factors*>(p.factors);
  const Settings settings{static_cast<float>(p.beta1),
                          static_cast<float>(p.beta2),
                          static_cast<float>(p.max_variance),
                          static_cast<float>(p.eps),
                          static_cast<float>(1.0 - p.lr * p.weight_decay),
                          p.rounding_seed};
  return for_each_table<Updated>(
      p.tensor_count, Shape<Parameter, Gradient, Mean, Variance>::ELEMENTS,
      [&](int64_t t) {
        const AdamW16Tensor& tensor = p.tensors[t];
        return Updated{tensor.parameter,     tensor.gradient, tensor.first_moment,
                       tensor.second_moment, factors + t,     tensor.count};
      },
      [&](const TensorTable<Updated>& table, unsigned tiles) {
        return launch(update<Rounding, Parameter, Gradient, Mean, Variance>, tiles, TILE_THREADS, stream, table,
                      settings, p.found_nonfinite);
      });
}

template <class Rounding, class Parameter, class Gradient>
const char* update_any(const AdamW16Step& p, cudaStream_t stream) {
  if (p.first_moment_coded) {
    return p.second_moment_coded ? update_all<Rounding, Parameter, Gradient, Fp169, Fp0610>(p, stream)
                                 : update_all<Rounding, Parameter, Gradient, Fp169, float>(p, stream);
  }
  return p.second_moment_coded ? update_all<Rounding, Parameter, Gradient, float, Fp0610>(p, stream)
                               : update_all<Rounding, Parameter, Gradient, float, float>(p, stream);
}

template <class Rounding, class Parameter>
const char* update_any(const AdamW16Step& p, cudaStream_t stream) {
  switch (p.gradient_dtype) {
    case Dtype::float32: return update_any<Rounding, Parameter, float>(p, stream);
    case Dtype::float16: return update_any<Rounding, Parameter, Half>(p, stream);
    case Dtype::bfloat16: return update_any<Rounding, Parameter, BFloat16>(p, stream);
    default: return "unknown dtype";
  }
}

// Of 16-bit parameters.
template <class Parameter>
const char* update_narrow(const AdamW16Step& p, cudaStream_t stream) {
  return p.stochastic_rounding ? update_any<Stochastic, Parameter>(p, stream)
                               : update_any<Nearest, Parameter>(p, stream);
}

}  // namespace

const char* adamw16_step(const AdamW16Step& p, void* stream) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  const char* error = count_all(p, s);
  if (error != nullptr) return error;
  switch (p.parameter_dtype) {
    case Dtype::float32: return update_any<Nearest, float>(p, s);
    case Dtype::float16: return update_narrow<Half>(p, s);
    case Dtype::bfloat16: return update_narrow<BFloat16>(p, s);
    default: return "unknown dtype";
  }
}

}  // namespace dalle::cuda
