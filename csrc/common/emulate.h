// AVX-512 and its BF16 dot products on a processor that has neither, by SIMDe
// (https://github.com/simd-everywhere/simde).
//
// Included ahead of a kernel source where CMake is told -DDALLE_KERNELS_EMULATE: every intrinsic of the AVX-512 builds
// then becomes a function of SIMDe's, in AVX2, and the sources are compiled as they are.
#pragma once

#include <immintrin.h>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512VL__ 1
#define __AVX512DQ__ 1
#if defined(DALLE_EMULATE_BF16)
#define __AVX512BF16__ 1
#endif

// What SIMDe's release 0.7.4 lacks, lane by lane.
namespace dalle_emulate {

template <class To, class From>
inline To as(From from) {
  static_assert(sizeof(To) == sizeof(From), "expected as many bits");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}
struct Halves {
  __m256i low, high;
};
template <class Wide>
inline Halves halves(Wide x) {
  return as<Halves>(x);
}
template <class Wide, class Half>
inline Wide joined(Half low, Half high) {
  const Halves both{as<__m256i>(low), as<__m256i>(high)};
  return as<Wide>(both);
}
inline __m512 cvtepi32_ps(__m512i x) {
  return joined<__m512>(_mm256_cvtepi32_ps(halves(x).low), _mm256_cvtepi32_ps(halves(x).high));
}
inline __m512i cvtepu16_epi32(__m256i x) {
  return joined<__m512i>(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(x)),
                         _mm256_cvtepu16_epi32(_mm256_extracti128_si256(x, 1)));
}
inline __m256i cvtepi32_epi16(__m512i x) {
  int in[16];
  short out[16];
  __builtin_memcpy(in, &x, 64);
  for (int i = 0; i < 16; ++i) out[i] = static_cast<short>(in[i]);
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(out));
}
inline __m512 cvtph_ps(__m256i x) {
  return joined<__m512>(_mm256_cvtph_ps(_mm256_castsi256_si128(x)), _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1)));
}
inline __m256i cvtps_ph(__m512 x) {
  const __m128i low = _mm256_cvtps_ph(as<__m256>(halves(x).low), _MM_FROUND_TO_NEAREST_INT);
  return _mm256_set_m128i(_mm256_cvtps_ph(as<__m256>(halves(x).high), _MM_FROUND_TO_NEAREST_INT), low);
}
inline __m512 shuffle_f32x4(__m512 a, __m512 b, int order) {
  struct Quarters {
    __m128 lane[4];
  };
  const Quarters x = as<Quarters>(a), y = as<Quarters>(b);
  return as<__m512>(Quarters{{x.lane[order & 3], x.lane[(order >> 2) & 3], y.lane[(order >> 4) & 3],
                              y.lane[(order >> 6) & 3]}});
}
inline __m512i srai_epi32(__m512i x, int bits) {
  return joined<__m512i>(_mm256_srai_epi32(halves(x).low, bits), _mm256_srai_epi32(halves(x).high, bits));
}
inline __m256 maskz_extractf32x8_ps(unsigned char mask, __m512 x, int half) {
  float lanes[8];
  _mm256_storeu_ps(lanes, as<__m256>(half ? halves(x).high : halves(x).low));
  for (int i = 0; i < 8; ++i) lanes[i] = (mask >> i) & 1 ? lanes[i] : 0.0f;
  return _mm256_loadu_ps(lanes);
}
// Rounds to nearest even; lanes of `low` come first.
inline __m512i cvtne2ps_pbh(__m512 high, __m512 low) {
  unsigned in[32];
  unsigned short out[32];
  __builtin_memcpy(in, &low, 64);
  __builtin_memcpy(in + 16, &high, 64);
  for (int i = 0; i < 32; ++i) {
    const bool nan = (in[i] & 0x7fffffffu) > 0x7f800000u;
    out[i] = static_cast<unsigned short>(nan ? (in[i] >> 16) | 0x40u : (in[i] + 0x7fffu + ((in[i] >> 16) & 1u)) >> 16);
  }
  __m512i result;
  __builtin_memcpy(&result, out, 64);
  return result;
}

}  // namespace dalle_emulate

#define _mm512_cvtepi32_ps(x) dalle_emulate::cvtepi32_ps(x)
#define _mm512_cvtepi32_epi16(x) dalle_emulate::cvtepi32_epi16(x)
#define _mm512_cvtepu16_epi32(x) dalle_emulate::cvtepu16_epi32(x)
#define _mm512_cvtph_ps(x) dalle_emulate::cvtph_ps(x)
#define _mm512_cvtps_ph(x, rounding) dalle_emulate::cvtps_ph(x)
#define _mm512_shuffle_f32x4(a, b, order) dalle_emulate::shuffle_f32x4(a, b, order)
#define _mm512_srai_epi32(x, bits) dalle_emulate::srai_epi32(x, bits)
#define _mm512_maskz_extractf32x8_ps(mask, x, half) dalle_emulate::maskz_extractf32x8_ps(mask, x, half)
#define _mm512_cvtne2ps_pbh(high, low) dalle_emulate::as<__m512bh>(dalle_emulate::cvtne2ps_pbh(high, low))
