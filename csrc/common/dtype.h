// Element types and the exact conversions between their bits and float, on host and device, free of branches.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/intrinsics.h"
#include "common/target.h"

namespace dalle {

// The numbers are those that dalle_kernels/_native.py passes.
enum class Dtype : int { float32 = 0, float16 = 1, bfloat16 = 2, float64 = 3 };

// Storage only: a distinct type for each 16-bit format, so that overloads tell them apart.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

}  // namespace dalle

namespace dalle::DALLE_ISA_NAMESPACE {

DALLE_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
DALLE_INLINE uint64_t bits_of(double x) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
DALLE_INLINE float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
DALLE_INLINE double double_of(uint64_t bits) {
  double x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

DALLE_INLINE float to_float(float x) { return x; }
DALLE_INLINE float to_float(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
DALLE_INLINE float to_float(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  const uint32_t exponent = magnitude & 0x0f800000u;
  // Rebias by 112; infinities and NaN by 224, up to float's own; subnormals get a leading one that is subtracted again.
  const uint32_t normal = magnitude + (exponent == 0x0f800000u ? 0x70000000u : 0x38000000u);
  const uint32_t subnormal = bits_of(float_of(magnitude + 0x38800000u) - float_of(0x38800000u));
  return float_of((exponent == 0 ? subnormal : normal) | sign);
}

// Round to nearest, ties to even, as torch does; NaN stays NaN.
DALLE_INLINE void from_float(float x, float& out) { out = x; }
DALLE_INLINE void from_float(float x, double& out) { out = x; }
DALLE_INLINE void from_float(float x, BFloat16& out) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
DALLE_INLINE void from_float(float x, Half& out) {
  const uint32_t bits = bits_of(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14: adding 1/2 leaves the rounded subnormal in the low bits of the sum.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x477ff000u ? 0x7c00u : result;
  result = magnitude > 0x7f800000u ? 0x7e00u : result;
  out.bits = static_cast<uint16_t>(result | ((bits >> 16) & 0x8000u));
}

// Runs of half precision, by the processor's own conversions where the build has them: the same values, eight at once.
DALLE_INLINE void to_float_run(const Half* input, float* output, int64_t count) {
  int64_t i = 0;
#if defined(__F16C__) && !defined(__CUDACC__)
  for (; i + 8 <= count; i += 8) {
    const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(input + i));
    _mm256_storeu_ps(output + i, _mm256_cvtph_ps(packed));
  }
#endif
  for (; i < count; ++i) output[i] = to_float(input[i]);
}
DALLE_INLINE void from_float_run(const float* input, Half* output, int64_t count) {
  int64_t i = 0;
#if defined(__F16C__) && !defined(__CUDACC__)
  for (; i + 8 <= count; i += 8) {
    const __m128i packed = _mm256_cvtps_ph(_mm256_loadu_ps(input + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(output + i), packed);
  }
#endif
  for (; i < count; ++i) from_float(input[i], output[i]);
}

}  // namespace dalle::DALLE_ISA_NAMESPACE
