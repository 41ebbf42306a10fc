// GELU of a Vector, x times the standard normal distribution's probability below x, and its derivative.
#pragma once

#include "common/vector_math.h"

namespace dalle::DALLE_ISA_NAMESPACE {

// The probability below x, given e^(-x^2 / 2). That is erfcx(|x| / sqrt 2) / 2 * e^(-x^2 / 2) beyond |x|; the first
// factor is a polynomial in 2 / (1 + 0.3 |x|) - 1, a fit of relative error 3e-8.
DALLE_INLINE Vector normal_probability(Vector x, Vector density) {
  const Vector one = broadcast(1.0f), zero = broadcast(0.0f), distance = maximum(x, zero - x);
  const Vector s = broadcast(2.0f) / multiply_add(broadcast(0.3f), distance, one) - one;
  Vector beyond = broadcast(-1.92827819e-5f);
  beyond = multiply_add(beyond, s, broadcast(1.66695845e-5f));
  beyond = multiply_add(beyond, s, broadcast(1.78505958e-4f));
  beyond = multiply_add(beyond, s, broadcast(-1.4320045e-4f));
  beyond = multiply_add(beyond, s, broadcast(-1.49684062e-3f));
  beyond = multiply_add(beyond, s, broadcast(-3.04139394e-4f));
  beyond = multiply_add(beyond, s, broadcast(1.47882681e-2f));
  beyond = multiply_add(beyond, s, broadcast(5.71550727e-2f));
  beyond = multiply_add(beyond, s, broadcast(0.12556459f));
  beyond = multiply_add(beyond, s, broadcast(0.193275049f));
  beyond = multiply_add(beyond, s, broadcast(0.110985309f));
  beyond = beyond * density;
  return select_less(x, zero, beyond, one - beyond);
}

DALLE_INLINE Vector gelu(Vector x) {
  return x * normal_probability(x, exponential(x * x * broadcast(-0.5f)));
}

// gelu(x), and its derivative: the probability below x plus x times the density at x.
DALLE_INLINE Vector gelu(Vector x, Vector& slope) {
  constexpr float ONE_OVER_ROOT_TWO_PI = 0.398942280f;
  const Vector density = exponential(x * x * broadcast(-0.5f)), probability = normal_probability(x, density);
  slope = multiply_add(x * broadcast(ONE_OVER_ROOT_TWO_PI), density, probability);
  return x * probability;
}

}  // namespace dalle::DALLE_ISA_NAMESPACE
