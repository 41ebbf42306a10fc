#include "mlp/mlp.h"

#include "common/gelu.h"
#include "common/parallel.h"

namespace dalle::DALLE_ISA_NAMESPACE {
namespace {

constexpr int64_t LANES = Vector::width;
constexpr int64_t GRAIN = 4096;    // elements that are worth a thread
constexpr int64_t SUMMED = 1024;  // elements summed in float, before double takes over

int64_t grain(int64_t rows) { return rows < GRAIN ? GRAIN / (rows > 0 ? rows : 1) : 1; }

template <class T>
const char* forward(const BiasGelu& p) {
  parallel_for(p.width, grain(p.rows), p.threads, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const T* hidden = static_cast<const T*>(p.hidden) + unit * p.rows;
      T* out = static_cast<T*>(p.out) + unit * p.rows;
      const Vector bias = broadcast(to_float(static_cast<const T*>(p.bias)[unit]));
      for (int64_t r = 0; r < p.rows; r += LANES) {
        const int64_t left = p.rows - r;
        store_first(out + r, left, gelu(load_first(hidden + r, left) + bias));
      }
    }
  });
  return nullptr;
}

// Returns the sum of the new gradient.
template <class T>
float backward_piece(const T* hidden, Vector bias, int64_t count, T* gradient, T* activation) {
  Vector sum = broadcast(0.0f);
  for (int64_t r = 0; r < count; r += LANES) {
    const int64_t left = count - r;
    Vector slope;
    store_first(activation + r, left, gelu(load_first(hidden + r, left) + bias, slope));
    // Beyond the last element the gradient is loaded as 0 and its slope is finite.
    const Vector product = load_first(gradient + r, left) * slope;
    store_first(gradient + r, left, product);
    sum = sum + product;
  }
  return sum_of_lanes(sum);
}

template <class T>
const char* backward(const BiasGeluBackward& p) {
  parallel_for(p.width, grain(p.rows), p.threads, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const float bias = to_float(static_cast<const T*>(p.bias)[unit]);
      double sum = 0;
      for (int64_t r = 0; r < p.rows; r += SUMMED) {
        const int64_t first = unit * p.rows + r, count = p.rows - r < SUMMED ? p.rows - r : SUMMED;
        sum += backward_piece(static_cast<const T*>(p.hidden) + first, broadcast(bias), count,
                              static_cast<T*>(p.gradient) + first, static_cast<T*>(p.activation) + first);
      }
      from_float(static_cast<float>(sum), static_cast<T*>(p.bias_gradient)[unit]);
    }
  });
  return nullptr;
}

}  // namespace

const char* bias_gelu(const BiasGelu& p) {
  switch (p.dtype) {
    case Dtype::float32: return forward<float>(p);
    case Dtype::float16: return forward<Half>(p);
    case Dtype::bfloat16: return forward<BFloat16>(p);
    default: return "expected float32, float16 or bfloat16";
  }
}

const char* bias_gelu_backward(const BiasGeluBackward& p) {
  switch (p.dtype) {
    case Dtype::float32: return backward<float>(p);
    case Dtype::float16: return backward<Half>(p);
    case Dtype::bfloat16: return backward<BFloat16>(p);
    default: return "expected float32, float16 or bfloat16";
  }
}

}  // namespace dalle::DALLE_ISA_NAMESPACE
