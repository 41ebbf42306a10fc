
#include "adamw/adamw.h"

#include "adamw/rounding.h"
#include "common/tensor_list.h"
#include "float16/codec_pair.h"

namespace dalle::DALLE_ISA_NAMESPACE {
namespace {

// A thread is worth waking for about this many elements.
constexpr int64_t GRAIN = 8192;

// How many elements ahead memory is asked for: the processor's own prefetching does not keep up with four arrays.
constexpr int64_t AHEAD = 512;

// What the update of one tensor works with; the same for every element.
struct Coefficients {
  float gradient_factor, beta1, mean_rate, beta2, variance_rate, max_variance, inverse_root_correction, eps, decay,
      minus_step_size;
  uint64_t rounding_seed;
};

// The power of two next to |x| that is above it, as far as float holds it and its inverse.
double power_of_two(double x) {
  int exponent;
  const double power = x / __builtin_frexp(x, &exponent);
  return power < 0x1p-126 ? 0x1p-126 : power > 0x1p126 ? 0x1p126 : power;
}

Coefficients coefficients(const AdamW16Step& p, float step) {
  const double correction1 = 1.0 - __builtin_pow(p.beta1, step), correction2 = 1.0 - __builtin_pow(p.beta2, step);
  const double whole_scale = p.grad_scale == nullptr ? 1.0 : *p.grad_scale;
  // Gradients are divided by the power of two first, which rounds nothing: the square of the whole scale may be far
  // out of float's range, and so may that of a gradient as it comes.
  const double power = power_of_two(whole_scale), scale = whole_scale / power;
  return {static_cast<float>(1.0 / power),
          static_cast<float>(p.beta1),
          static_cast<float>((1.0 - p.beta1) / scale),
          static_cast<float>(p.beta2),
          static_cast<float>((1.0 - p.beta2) / (scale * scale)),
          static_cast<float>(p.max_variance),
          static_cast<float>(1.0 / __builtin_sqrt(correction2)),
          static_cast<float>(p.eps),
          static_cast<float>(1.0 - p.lr * p.weight_decay),
          static_cast<float>(-p.lr / correction1),
          p.rounding_seed};
}

// a * b + c rounded once, as the reference does it, so that every build and every machine gives the same bits.
DALLE_INLINE Vector fused(Vector a, Vector b, Vector c) {
#if defined(__FMA__)
  return multiply_add(a, b, c);
#else
  for (int i = 0; i < Vector::width; ++i) c.lanes[i] = __builtin_fmaf(a.lanes[i], b.lanes[i], c.lanes[i]);
  return c;
#endif
}

// The same in registers, which a compiler cannot see to by itself: stores might change the floats.
struct Update {
  Vector gradient_factor, beta1, mean_rate, beta2, variance_rate, max_variance, inverse_root_correction, eps, decay,
      minus_step_size;

  explicit Update(const Coefficients& c)
      : gradient_factor(broadcast(c.gradient_factor)),
        beta1(broadcast(c.beta1)),
        mean_rate(broadcast(c.mean_rate)),
        beta2(broadcast(c.beta2)),
        variance_rate(broadcast(c.variance_rate)),
        max_variance(broadcast(c.max_variance)),
        inverse_root_correction(broadcast(c.inverse_root_correction)),
        eps(broadcast(c.eps)),
        decay(broadcast(c.decay)),
        minus_step_size(broadcast(c.minus_step_size)) {}

  Vector gradient(Vector scaled) const { return scaled * gradient_factor; }
  Vector mean(Vector old, Vector gradient) const { return fused(gradient, mean_rate, old * beta1); }
  Vector variance(Vector old, Vector gradient) const {
    return minimum(fused(gradient * variance_rate, gradient, old * beta2), max_variance);  // NaN: the largest
  }
  Vector root(Vector variance) const { return fused(square_root(variance), inverse_root_correction, eps); }
  Vector parameter(Vector old, Vector ratio) const { return fused(minus_step_size, ratio, old * decay); }
};

// The arrays of one tensor.
template <class Parameter, class Gradient, class Mean, class Variance>
struct Arrays {
  Parameter* parameters;
  const Gradient* gradients;
  Mean* means;
  Variance* variances;

  // Moves the moments of Pair::width elements from the i-th on; gives the new mean and what it is to be divided by.
  void move_moments(const Update& update, int64_t i, Pair& mean, Pair& root) const {
    const Pair scaled = load_pair(gradients + i), old_mean = load_pair(means + i);
    const Pair old_variance = load_pair(variances + i);
    const Pair gradient{update.gradient(scaled.a), update.gradient(scaled.b)};
    mean = {update.mean(old_mean.a, gradient.a), update.mean(old_mean.b, gradient.b)};
    const Pair variance{update.variance(old_variance.a, gradient.a), update.variance(old_variance.b, gradient.b)};
    root = {update.root(variance.a), update.root(variance.b)};
    store_pair(means + i, mean);
    store_nonnegative_pair(variances + i, variance);
  }
  void move_parameters(const Update& update, int64_t i, Pair ratio) const {
    const Pair old = load_pair(parameters + i);
    store_pair(parameters + i, {update.parameter(old.a, ratio.a), update.parameter(old.b, ratio.b)});
  }
  void prefetch(int64_t i) const {
    __builtin_prefetch(parameters + i, 1);
    __builtin_prefetch(gradients + i, 0);
    __builtin_prefetch(means + i, 1);
    __builtin_prefetch(variances + i, 1);
  }
};

// For whole pairs. The addresses are a copy of its own, which no store can change: they stay in registers.
template <class Parameter, class Gradient, class Mean, class Variance>
__attribute__((noinline)) void update_pairs(const Update& update, Arrays<Parameter, Gradient, Mean, Variance> arrays,
                                            int64_t begin, int64_t end) {
  // Roots and quotients take long: while those of some elements are on their way, others are decoded and encoded.
  Pair mean, root;
  arrays.move_moments(update, begin, mean, root);
  for (int64_t i = begin;;) {
    const Pair ratio{mean.a / root.a, mean.b / root.b};
    const int64_t next = i + Pair::width;
    if (next == end) return arrays.move_parameters(update, i, ratio);
    arrays.prefetch(next + AHEAD);
    arrays.move_moments(update, next, mean, root);
    arrays.move_parameters(update, i, ratio);
    i = next;
  }
}

template <class Parameter, class Gradient, class Mean, class Variance>
void update_run(const Coefficients& coefficients, const AdamW16Tensor& tensor, int64_t begin, int64_t end) {
  using Run = Arrays<Parameter, Gradient, Mean, Variance>;
  const Run run{static_cast<Parameter*>(tensor.parameter), static_cast<const Gradient*>(tensor.gradient),
                static_cast<Mean*>(tensor.first_moment), static_cast<Variance*>(tensor.second_moment)};
  const Update update(coefficients);
  const int64_t rest = (end - begin) % Pair::width, whole = end - rest;
  if (begin < whole) update_pairs(update, run, begin, whole);
  if (rest == 0) return;
  Parameter parameters[Pair::width] = {};
  Gradient gradients[Pair::width] = {};
  Mean means[Pair::width] = {};
  Variance variances[Pair::width] = {};
  memcpy(parameters, run.parameters + whole, rest * sizeof *parameters);
  memcpy(gradients, run.gradients + whole, rest * sizeof *gradients);
  memcpy(means, run.means + whole, rest * sizeof *means);
  memcpy(variances, run.variances + whole, rest * sizeof *variances);
  update_pairs(update, Run{parameters, gradients, means, variances}, 0, Pair::width);
  memcpy(run.parameters + whole, parameters, rest * sizeof *parameters);
  memcpy(run.means + whole, means, rest * sizeof *means);
  memcpy(run.variances + whole, variances, rest * sizeof *variances);
}

// The same with 16-bit parameters rounded stochastically: they are updated as floats, some at a time.
template <class Parameter, class Gradient, class Mean, class Variance>
void update_run_rounding(const Coefficients& coefficients, const AdamW16Tensor& tensor, int64_t begin, int64_t end) {
  const uint64_t row = (static_cast<uint64_t>(tensor.number) << 32) + static_cast<uint64_t>(*tensor.step) + 1;
  for (int64_t first = begin; first < end; first += SPLIT) {
    const int64_t count = end - first < SPLIT ? end - first : SPLIT;
    Parameter* parameters = static_cast<Parameter*>(tensor.parameter) + first;
    float values[SPLIT];
    for (int64_t i = 0; i < count; ++i) values[i] = to_float(parameters[i]);
    const AdamW16Tensor part{values,
                             static_cast<const Gradient*>(tensor.gradient) + first,
                             static_cast<Mean*>(tensor.first_moment) + first,
                             static_cast<Variance*>(tensor.second_moment) + first,
                             tensor.step,
                             count,
                             tensor.number};
    update_run<float, Gradient, Mean, Variance>(coefficients, part, 0, count);
    uint32_t words[SPLIT];
    philox_words(coefficients.rounding_seed, row, first, PHILOX_USE_ROUNDING, words);
    for (int64_t i = 0; i < count; ++i) parameters[i] = rounded_stochastically<Parameter>(values[i], words[i]);
  }
}

using UpdateRun = void (*)(const Coefficients&, const AdamW16Tensor&, int64_t begin, int64_t end);

template <class Parameter, class Gradient, class Mean, class Variance>
UpdateRun choose(const AdamW16Step& p) {
  if constexpr (sizeof(Parameter) == 2) {
    if (p.stochastic_rounding) return &update_run_rounding<Parameter, Gradient, Mean, Variance>;
  }
  return &update_run<Parameter, Gradient, Mean, Variance>;
}

template <class Parameter, class Gradient>
UpdateRun choose(const AdamW16Step& p) {
  if (p.first_moment_coded) {
    return p.second_moment_coded ? choose<Parameter, Gradient, Fp169, Fp0610>(p)
                                 : choose<Parameter, Gradient, Fp169, float>(p);
  }
  return p.second_moment_coded ? choose<Parameter, Gradient, float, Fp0610>(p)
                               : choose<Parameter, Gradient, float, float>(p);
}

template <class Parameter>
UpdateRun choose(const AdamW16Step& p) {
  switch (p.gradient_dtype) {
    case Dtype::float32: return choose<Parameter, float>(p);
    case Dtype::float16: return choose<Parameter, Half>(p);
    case Dtype::bfloat16: return choose<Parameter, BFloat16>(p);
    default: return nullptr;
  }
}

UpdateRun choose_run(const AdamW16Step& p) {
  switch (p.parameter_dtype) {
    case Dtype::float32: return choose<float>(p);
    case Dtype::float16: return choose<Half>(p);
    case Dtype::bfloat16: return choose<BFloat16>(p);
    default: return nullptr;
  }
}

}  // namespace

const char* adamw16_step(const AdamW16Step& p) {
  const UpdateRun run = choose_run(p);
  if (run == nullptr) return "unknown dtype";
  if (p.found_nonfinite != nullptr && *p.found_nonfinite != 0) return nullptr;
  parallel_for_tensors(p.tensors, p.tensor_count, GRAIN, p.threads,
                       [&](const AdamW16Tensor& tensor, int64_t begin, int64_t end) {
                         run(coefficients(p, *tensor.step + 1.0f), tensor, begin, end);
                       });
  for (int64_t t = 0; t < p.tensor_count; ++t) *p.tensors[t].step += 1.0f;
  return nullptr;
}

}  // namespace dalle::DALLE_ISA_NAMESPACE
