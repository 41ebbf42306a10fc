// Philox4x32-10 as dalle_kernels/philox.py defines it, with one row of the noise in each lane of a Vector.
//
// A counter is (column / 4, row low, row high, 0) and gives four words, those of columns 4c .. 4c + 3: lanes that hold
// rows get the words of four columns as four vectors and nothing has to be transposed. Products of 32 bits by 32 need
// lanes of 64, so the even rows of a vector go through the rounds in one register and the odd ones in another. Of the
// ten rounds the first two are nearly free: what depends on the row alone is made once a row, what depends on the
// column alone once a column for all rows.
//
// Cost: 32 instructions a vector for the rounds and 10 for the uniform number; a wide multiplication, a shift and two
// XORs a word and round are the least that the definition allows.
#pragma once

#include "common/vector_integer.h"

#if defined(__SSE2__) && !defined(__AVX2__)
#include <emmintrin.h>
#endif

namespace dalle::DALLE_ISA_NAMESPACE {

// Lanes of 64 bits, half as many as a Vector has.
#if defined(__AVX512F__)

struct WideVector {
  __m512i lanes;
};
DALLE_INLINE WideVector load_wide(const uint64_t* p) { return {_mm512_loadu_si512(p)}; }
DALLE_INLINE WideVector broadcast_wide(uint64_t x) { return {_mm512_set1_epi64(static_cast<long long>(x))}; }
DALLE_INLINE WideVector operator^(WideVector a, WideVector b) { return {_mm512_xor_si512(a.lanes, b.lanes)}; }
DALLE_INLINE WideVector multiply_low(WideVector a, WideVector b) { return {_mm512_mul_epu32(a.lanes, b.lanes)}; }
DALLE_INLINE WideVector high_word(WideVector x) { return {_mm512_srli_epi64(x.lanes, 32)}; }
DALLE_INLINE IntegerVector join_low(WideVector even, WideVector odd) {
  return {_mm512_mask_blend_epi32(0xaaaa, even.lanes, _mm512_slli_epi64(odd.lanes, 32))};
}

#elif defined(__AVX2__)

struct WideVector {
  __m256i lanes;
};
DALLE_INLINE WideVector load_wide(const uint64_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
}
DALLE_INLINE WideVector broadcast_wide(uint64_t x) { return {_mm256_set1_epi64x(static_cast<long long>(x))}; }
DALLE_INLINE WideVector operator^(WideVector a, WideVector b) { return {_mm256_xor_si256(a.lanes, b.lanes)}; }
DALLE_INLINE WideVector multiply_low(WideVector a, WideVector b) { return {_mm256_mul_epu32(a.lanes, b.lanes)}; }
DALLE_INLINE WideVector high_word(WideVector x) { return {_mm256_srli_epi64(x.lanes, 32)}; }
DALLE_INLINE IntegerVector join_low(WideVector even, WideVector odd) {
  return {_mm256_blend_epi32(even.lanes, _mm256_slli_epi64(odd.lanes, 32), 0xaa)};
}

#else

typedef uint64_t WideLanes __attribute__((vector_size(16)));
struct WideVector {
  WideLanes lanes;
};
DALLE_INLINE WideVector load_wide(const uint64_t* p) { return {WideLanes{p[0], p[1]}}; }
DALLE_INLINE WideVector broadcast_wide(uint64_t x) { return {WideLanes{x, x}}; }
DALLE_INLINE WideVector operator^(WideVector a, WideVector b) { return {a.lanes ^ b.lanes}; }
DALLE_INLINE WideVector multiply_low(WideVector a, WideVector b) {
#if defined(__SSE2__)
  const __m128i product = _mm_mul_epu32(reinterpret_cast<__m128i>(a.lanes), reinterpret_cast<__m128i>(b.lanes));
  return {reinterpret_cast<WideLanes>(product)};
#else
  return {(a.lanes & 0xffffffffu) * (b.lanes & 0xffffffffu)};
#endif
}
DALLE_INLINE WideVector high_word(WideVector x) { return {x.lanes >> 32}; }
DALLE_INLINE IntegerVector join_low(WideVector even, WideVector odd) {
  return {reinterpret_cast<UnsignedLanes>((even.lanes & 0xffffffffu) | (odd.lanes << 32))};
}

#endif

// multiply_low multiplies the low words of two lanes in full and does not look at their high ones; join_low(even, odd)
// has the low words of `even` in its even lanes and those of `odd` in its odd ones (words in memory are little-endian).

constexpr uint32_t PHILOX_MULTIPLIER[2] = {0xD2511F53u, 0xCD9E8D57u}, PHILOX_KEY_STEP[2] = {0x9E3779B9u, 0xBB67AE85u};
constexpr int PHILOX_ROUNDS = 10, PHILOX_WORDS = 4;
// Rounds 0, 1 and half of 2 are taken apart into what depends on the row and what depends on the column.
constexpr int PHILOX_WHOLE_ROUNDS = 7;

DALLE_INLINE uint32_t high_word(uint64_t x) { return static_cast<uint32_t>(x >> 32); }
DALLE_INLINE uint32_t low_word(uint64_t x) { return static_cast<uint32_t>(x); }

struct PhiloxKey {
  uint32_t first[3][2];                          // of rounds 0, 1 and 2
  WideVector rounds[PHILOX_WHOLE_ROUNDS][2];     // of the others; the last is complemented, see complement_words

  explicit PhiloxKey(uint64_t seed) {
    uint32_t key[2] = {low_word(seed), high_word(seed)};
    for (int round = 0; round < PHILOX_ROUNDS; ++round) {
      for (int i = 0; i < 2; ++i) {
        if (round < 3) {
          first[round][i] = key[i];
        } else {
          rounds[round - 3][i] = broadcast_wide(round + 1 < PHILOX_ROUNDS ? key[i] : ~key[i]);
        }
        key[i] += PHILOX_KEY_STEP[i];
      }
    }
  }
};

// What the first rounds make of the rows of one Vector: element [0] of the even rows, [1] of the odd ones.
struct PhiloxRows {
  uint64_t a[2][Vector::width / 2], b[2][Vector::width / 2], c[2][Vector::width / 2];

  // Lane i holds the global row first + i (modulo 2^64).
  PhiloxRows() = default;
  PhiloxRows(const PhiloxKey& key, uint64_t first) {
    for (int i = 0; i < Vector::width; ++i) {
      const uint64_t row = first + static_cast<uint64_t>(i);
      const uint64_t product1 = uint64_t{PHILOX_MULTIPLIER[1]} * high_word(row);
      const uint32_t x0 = high_word(product1) ^ low_word(row) ^ key.first[0][0];
      const uint64_t product0 = uint64_t{PHILOX_MULTIPLIER[0]} * x0;
      a[i % 2][i / 2] = low_word(product1);
      b[i % 2][i / 2] = high_word(product0);
      c[i % 2][i / 2] = low_word(product0) ^ key.first[2][1];
    }
  }
};

// What they make of four columns, 4 * group .. 4 * group + 3.
struct PhiloxColumns {
  uint32_t a, b, c;

  PhiloxColumns(const PhiloxKey& key, uint32_t group) {
    const uint64_t product0 = uint64_t{PHILOX_MULTIPLIER[0]} * group;
    const uint32_t x2 = high_word(product0) ^ key.first[0][1];
    const uint64_t product1 = uint64_t{PHILOX_MULTIPLIER[1]} * x2;
    a = high_word(product1) ^ key.first[1][0];
    b = low_word(product0) ^ key.first[1][1];
    c = low_word(product1) ^ key.first[2][0];
  }
};

// words[i][j] = 2^32 - 1 - bits of column 4 * group + j, for each row of rows[i]. The rounds are one chain of dependent
// operations a counter: with COUNT of 2 the processor has the chains of two vectors to fill its pipes with.
template <int COUNT>
DALLE_INLINE void complement_words(const PhiloxKey& key, const PhiloxRows* rows, const PhiloxColumns& columns,
                                   IntegerVector (*words)[PHILOX_WORDS]) {
  const WideVector multiplier0 = broadcast_wide(PHILOX_MULTIPLIER[0]);
  const WideVector multiplier1 = broadcast_wide(PHILOX_MULTIPLIER[1]);
  const WideVector a = broadcast_wide(columns.a), b = broadcast_wide(columns.b), c = broadcast_wide(columns.c);
  WideVector x[2 * COUNT][PHILOX_WORDS];
  for (int i = 0; i < 2 * COUNT; ++i) {
    const PhiloxRows& own = rows[i / 2];
    const WideVector product0 = multiply_low(load_wide(own.a[i % 2]) ^ a, multiplier0);
    const WideVector product1 = multiply_low(load_wide(own.b[i % 2]) ^ b, multiplier1);
    x[i][0] = high_word(product1) ^ c;
    x[i][1] = product1;
    x[i][2] = high_word(product0) ^ load_wide(own.c[i % 2]);
    x[i][3] = product0;
  }
  for (int round = 0; round < PHILOX_WHOLE_ROUNDS; ++round) {
    for (WideVector(&w)[PHILOX_WORDS] : x) {
      const WideVector product0 = multiply_low(w[0], multiplier0), product1 = multiply_low(w[2], multiplier1);
      w[0] = high_word(product1) ^ (w[1] ^ key.rounds[round][0]);
      w[1] = product1;
      w[2] = high_word(product0) ^ (w[3] ^ key.rounds[round][1]);
      w[3] = product0;
    }
  }
  // Words 0 and 2 were complemented by the last key.
  for (int i = 0; i < COUNT; ++i) {
    for (int j = 0; j < PHILOX_WORDS; ++j) words[i][j] = join_low(x[2 * i][j], x[2 * i + 1][j]);
    words[i][1] = words[i][1] ^ broadcast_integer(0xffffffffu);
    words[i][3] = words[i][3] ^ broadcast_integer(0xffffffffu);
  }
}

// v = fp32(word) * 2^-32 + 2^-33, at most 1 - 2^-24, each step rounded to nearest even.
DALLE_INLINE Vector complement_uniform(IntegerVector word) {
  // 2^-9 + low * 2^-32 and 2^7 + high * 2^-16, made by setting bits below a leading one: the sum is rounded once.
  const Vector low = as_float((word & broadcast_integer(0xffffu)) | broadcast_integer(0x3b000000u));
  const Vector high = as_float(shift_right<16>(word) | broadcast_integer(0x43000000u));
  const Vector scaled = (high - broadcast(0x1p7f + 0x1p-9f)) + low;
  return minimum(scaled + broadcast(0x1p-33f), broadcast(1.0f - 0x1p-24f));
}

}  // namespace dalle::DALLE_ISA_NAMESPACE
