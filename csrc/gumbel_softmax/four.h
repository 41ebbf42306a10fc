// Four vectors that go through the same operations side by side, and the functions of this family on them.
//
// One vector's chain of dependent operations is longer than what a processor looks ahead, so that independent ones have
// to lie next to each other in the program.
#pragma once

#include "common/vector_math.h"

namespace dalle::DALLE_ISA_NAMESPACE {

struct Four {
  Vector v[4];
};

#define DALLE_FOUR(expression)                          \
  Four result;                                          \
  for (int i = 0; i < 4; ++i) result.v[i] = expression; \
  return result
DALLE_INLINE Four four(Vector x) { return {{x, x, x, x}}; }
DALLE_INLINE Four operator+(const Four& a, const Four& b) { DALLE_FOUR(a.v[i] + b.v[i]); }
DALLE_INLINE Four operator-(const Four& a, const Four& b) { DALLE_FOUR(a.v[i] - b.v[i]); }
DALLE_INLINE Four operator*(const Four& a, const Four& b) { DALLE_FOUR(a.v[i] * b.v[i]); }
DALLE_INLINE Four maximum(const Four& a, const Four& b) { DALLE_FOUR(maximum(a.v[i], b.v[i])); }
DALLE_INLINE Four multiply_add(const Four& a, const Four& b, const Four& c) {
  DALLE_FOUR(multiply_add(a.v[i], b.v[i], c.v[i]));
}
DALLE_INLINE Four reduced_product(const Four& a, const Four& b, const Four& c) {
  DALLE_FOUR(reduced_product(a.v[i], b.v[i], c.v[i]));
}
#undef DALLE_FOUR

DALLE_INLINE Vector largest_of(const Four& x) { return maximum(maximum(x.v[0], x.v[1]), maximum(x.v[2], x.v[3])); }
DALLE_INLINE Vector sum_of(const Four& x) { return (x.v[0] + x.v[1]) + (x.v[2] + x.v[3]); }
DALLE_INLINE Vector dot_of(const Four& a, const Four& b) {
  return multiply_add(a.v[1], b.v[1], a.v[0] * b.v[0]) + multiply_add(a.v[3], b.v[3], a.v[2] * b.v[2]);
}

// A polynomial of degree 7, highest coefficient first; its even and odd powers are two chains.
DALLE_INLINE Four polynomial(const Four& x, const Four& square, const float (&c)[8]) {
  Four odd = four(broadcast(c[0])), even = four(broadcast(c[1]));
  for (int k = 2; k < 8; k += 2) {
    odd = multiply_add(odd, square, four(broadcast(c[k])));
    even = multiply_add(even, square, four(broadcast(c[k + 1])));
  }
  return multiply_add(odd, x, even);
}

// -log(-log1p(-v)) for the v of complement_uniform, with the errors that gumbel_softmax.h
// gives. Both polynomials are minimax fits, the first of
// the relative error, the second of the absolute one.
DALLE_INLINE Four gumbel(const Four& v) {
  constexpr float FIRST[] = {8.73462781e-2f, 0.143075451f, 0.149180532f, 0.1657051f,
                             0.199620649f,   0.250017554f, 0.333339512f, 0.499999911f};
  constexpr float SECOND[] = {-8.73342454e-2f, 0.144419104f, -0.149793714f, 0.16552335f,
                              -0.199536055f,   0.250024915f, -0.333342254f, 0.499999821f};
  const Vector one = broadcast(1.0f), minus_ln_2 = broadcast(-0.693147182f);
  // 1 - v = 2^k (1 - h), exactly: for k < 0, v is close enough to 1 for the difference to have no rounding.
  Four scale, k;
  for (int i = 0; i < 4; ++i) {
    const IntegerVector exponent = exponent_of(one - v.v[i]);
    scale.v[i] = as_float(broadcast_integer(0x3f800000u) - shift_left<23>(exponent));
    k.v[i] = to_float(exponent);
  }
  const Four h = multiply_add(v, scale, four(one) - scale), h2 = h * h;
  const Four w = multiply_add(polynomial(h, h2, FIRST), h2, multiply_add(k, four(minus_ln_2), h));
  Four f;
  for (int i = 0; i < 4; ++i) {
    const IntegerVector exponent = exponent_of(w.v[i]);
    f.v[i] = as_float(as_integer(w.v[i]) - shift_left<23>(exponent)) - one;
    k.v[i] = to_float(exponent);
  }
  const Four f2 = f * f;
  return multiply_add(polynomial(f, f2, SECOND), f2, multiply_add(k, four(minus_ln_2), four(broadcast(0.0f)) - f));
}

// 2^(x * factor) for x of 0 and below: exp2_of_product (common/vector.h), for four.
DALLE_INLINE Four exponential(const Four& x, const Factor& factor) {
  // Adding 1.5 * 2^23 rounds to a whole number and leaves it in the low bits, from where it shifts into the exponent.
  const Vector shift = broadcast(12582912.0f);
  const Four shifted = multiply_add(x, four(factor.high), four(shift)), minus_whole = four(shift) - shifted;
  const Four f = multiply_add(x, four(factor.low), reduced_product(x, four(factor.high), minus_whole));
  constexpr float COEFFICIENTS[] = {1.3398875e-3f, 9.61843692e-3f, 5.55033237e-2f, 0.240226477f, 0.693147182f, 1.0f};
  Four y = four(broadcast(1.5353362e-4f));
  for (const float c : COEFFICIENTS) {
    y = multiply_add(y, f, four(broadcast(c)));
  }
  for (int i = 0; i < 4; ++i) {
    // A product, since a sum of bits could make a number of NaN.
    const IntegerVector power = shift_left<23>(as_integer(shifted.v[i])) + broadcast_integer(0x3f800000u);
    y.v[i] = zero_where_less(y.v[i] * as_float(power), broadcast(126.0f), minus_whole.v[i]);
  }
  return y;
}

}  // namespace dalle::DALLE_ISA_NAMESPACE
