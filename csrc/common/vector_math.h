// Exponential and logarithms of a Vector, for every float.
//
// Worst relative errors, against float64, in units of 2^-24 (a unit in the last place is one to two of them), the same
// to 4 % with a fused multiply-add and without one: exponential 1.39, natural_log 1.36, log1p 2.08 (just above
// sqrt(2) - 1; 1.37 for negative numbers). tests/test_vector_math.py holds them.
// The polynomials are minimax fits of the relative error.
#pragma once

#include "common/vector_integer.h"

namespace dalle::DALLE_ISA_NAMESPACE {

constexpr float SMALLEST_NORMAL = 1.17549435e-38f, INFINITY_FLOAT = __builtin_inff();

// e^x: inf from 88.7228394 on, 0 below -87.3365402 (where it would be subnormal), NaN for NaN.
DALLE_INLINE Vector exponential(Vector x) {
  // Adding 1.5 * 2^23 rounds to a whole number and leaves it in the low bits, from where it shifts into the exponent.
  const Vector shift = broadcast(12582912.0f), shifted = multiply_add(x, broadcast(1.44269504f), shift);
  const Vector whole = shifted - shift;
  // ln 2 in two parts, the first with so few bits that its products with whole numbers are exact.
  Vector f = multiply_add(whole, broadcast(-0.693359375f), x);
  f = multiply_add(whole, broadcast(2.12194440e-4f), f);
  Vector y = broadcast(1.38145965e-3f);
  y = multiply_add(y, f, broadcast(8.36871751e-3f));
  y = multiply_add(y, f, broadcast(4.16683890e-2f));
  y = multiply_add(y, f, broadcast(0.166665211f));
  y = multiply_add(y, f, broadcast(0.49999994f));
  y = multiply_add(y, f * f, f) + broadcast(1.0f);
  y = as_float(as_integer(y) + shift_left<23>(as_integer(shifted)));
  y = select_less(x, broadcast(-87.3365402f), broadcast(0.0f), y);
  return select_less(x, broadcast(88.7228394f), y, x * broadcast(INFINITY_FLOAT));
}

// log(1 + f) + whole * ln 2 for 1 + f in [sqrt(1/2), sqrt(2)]; relatively exact near f = 0 if whole is 0 there.
DALLE_INLINE Vector log_of_parts(Vector f, Vector whole) {
  const Vector square = f * f;
  Vector y = broadcast(-7.63442963e-2f);
  y = multiply_add(y, f, broadcast(0.127615496f));
  y = multiply_add(y, f, broadcast(-0.131601945f));
  y = multiply_add(y, f, broadcast(0.142017618f));
  y = multiply_add(y, f, broadcast(-0.16623357f));
  y = multiply_add(y, f, broadcast(0.200012267f));
  y = multiply_add(y, f, broadcast(-0.250008225f));
  y = multiply_add(y, f, broadcast(0.333333313f));
  y = multiply_add(y, f * square, whole * broadcast(-2.12194440e-4f));
  y = multiply_add(square, broadcast(-0.5f), y);
  return multiply_add(whole, broadcast(0.693359375f), f + y);
}

// The whole k of x = 2^k m, m in [sqrt(1/2), sqrt(2)], as an integer; x is positive and normal.
DALLE_INLINE IntegerVector exponent_of(Vector x) {
  return shift_right_signed<23>(as_integer(x) - broadcast_integer(0x3f3504f3u));
}

// `y` where it is a logarithm of a positive finite `x`; else what a logarithm is there.
DALLE_INLINE Vector log_outside(Vector x, Vector y) {
  const Vector zero = broadcast(0.0f), infinity = broadcast(INFINITY_FLOAT);
  const Vector at_most_zero = select_equal(x, zero, broadcast(-INFINITY_FLOAT), broadcast(__builtin_nanf("")));
  return select_less(zero, x, select_less(x, infinity, y, x), at_most_zero);
}

// ln x: -inf for 0 of either sign, NaN below, inf for inf, NaN for NaN.
DALLE_INLINE Vector natural_log(Vector x) {
  const Vector smallest = broadcast(SMALLEST_NORMAL);
  const Vector normal = select_less(x, smallest, x * broadcast(8388608.0f), x);
  const IntegerVector exponent = exponent_of(normal);
  const Vector m = as_float(as_integer(normal) - shift_left<23>(exponent));
  const Vector whole = to_float(exponent) + select_less(x, smallest, broadcast(-23.0f), broadcast(0.0f));
  return log_outside(x, log_of_parts(m - broadcast(1.0f), whole));
}

// ln(1 + x), relatively exact near 0: -inf for -1, NaN below, inf for inf, NaN for NaN.
DALLE_INLINE Vector log1p(Vector x) {
  const Vector one = broadcast(1.0f), huge = broadcast(0x1p100f);
  const Vector reduced = select_less(x, huge, x, x * broadcast(0x1p-64f));
  const IntegerVector exponent = exponent_of(one + reduced);
  // 1 + f = 2^-k (1 + x) with one rounding at most, where the sum 1 + x has lost the low bits of x.
  const Vector scale = as_float(broadcast_integer(0x3f800000u) - shift_left<23>(exponent));
  const Vector f = multiply_add(reduced, scale, scale - one);
  const Vector whole = to_float(exponent) + select_less(x, huge, broadcast(0.0f), broadcast(64.0f));
  return log_outside(one + x, log_of_parts(f, whole));
}

}  // namespace dalle::DALLE_ISA_NAMESPACE
