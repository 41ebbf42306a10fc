// The one matrix product that attention is made of, register-blocked over packed operands.
//
// Operands are elements of 4 bytes: a float, or a Pair of bfloat16 that a dot product instruction takes at once, in
// which case a sum runs over half as many steps. Packed layouts have an innermost run of PANEL elements (two
// registers), so that products stream: blocked rows [block][row][PANEL] are a matrix cut into blocks of PANEL columns.
#pragma once

#include "common/vector.h"

namespace dalle::DALLE_ISA_NAMESPACE {

constexpr int PANEL = 2 * Vector::width;
// Rows of a register block: with two registers of columns, as many accumulators as leave room for the operands.
constexpr int MOST_ROWS = Vector::width == 16 ? 12 : 6;
// Steps of a sum between two tests of its end: the chains of scores are short.
constexpr int64_t STEPS_AT_ONCE = 4;
// How many numbers an element holds.
template <class Element>
constexpr int64_t NUMBERS_IN = 1;

// How A is laid out: rows of neighbouring steps, or steps of neighbouring rows.
enum class Order { by_row, by_step };

// A piece of the sum: where in A and B it begins, and how many steps it has.
struct Chunk {
  int64_t a, b, steps;
};

// C[r][0..columns) (+)= sum over the steps t of all chunks of A[r][t] B[t][0..columns). Steps of B, rows of C, and rows
// (or steps) of A are PANEL elements apart.
template <class Element>
struct Product {
  const Element *a, *b;
  const Chunk* chunk;
  int64_t chunks;
  int64_t partial;  // steps that one accumulator takes before it is added to the rest
};

template <Order ORDER, int ROWS, int VECTORS, class Element>
DALLE_NOINLINE void multiply_block(const Product<Element>& p, int64_t first_row, bool accumulate, float* c) {
  constexpr int64_t ROW = ORDER == Order::by_row ? PANEL : 1, STEP = ORDER == Order::by_row ? 1 : PANEL;
  for (int64_t i = 0; i < p.chunks; ++i) {
    const Element *a = p.a + p.chunk[i].a + first_row * ROW, *b = p.b + p.chunk[i].b;
    for (int64_t left = p.chunk[i].steps; left > 0; accumulate = true) {
      Vector sum[ROWS][VECTORS];
      for (int r = 0; r < ROWS; ++r) {
        for (int v = 0; v < VECTORS; ++v) sum[r][v] = broadcast(0.0f);
      }
      const int64_t steps = left < p.partial ? left : p.partial;
      left -= steps;
      const auto step = [&](int64_t t) {
        decltype(load(b)) columns[VECTORS];
        for (int v = 0; v < VECTORS; ++v) columns[v] = load(b + t * PANEL + v * Vector::width);
        for (int r = 0; r < ROWS; ++r) {
          const auto value = broadcast(a[r * ROW + t * STEP]);
          for (int v = 0; v < VECTORS; ++v) sum[r][v] = multiply_add(value, columns[v], sum[r][v]);
        }
      };
      int64_t t = 0;
      for (; t + STEPS_AT_ONCE <= steps; t += STEPS_AT_ONCE) {
        for (int64_t i = 0; i < STEPS_AT_ONCE; ++i) step(i);
        a += STEPS_AT_ONCE * STEP, b += STEPS_AT_ONCE * PANEL;
      }
      for (; t < steps; ++t, a += STEP, b += PANEL) step(0);
      for (int r = 0; r < ROWS; ++r) {
        for (int v = 0; v < VECTORS; ++v) {
          float* to = c + r * PANEL + v * Vector::width;
          store(to, accumulate ? load(to) + sum[r][v] : sum[r][v]);
        }
      }
    }
  }
}

template <Order ORDER, int ROWS, class Element>
DALLE_INLINE void multiply_rows(int rows, int vectors, const Product<Element>& p, int64_t first_row, bool accumulate,
                                float* c) {
  if (rows == ROWS && vectors == 2) return multiply_block<ORDER, ROWS, 2>(p, first_row, accumulate, c);
  if (rows == ROWS) return multiply_block<ORDER, ROWS, 1>(p, first_row, accumulate, c);
  if constexpr (ROWS > 1) multiply_rows<ORDER, ROWS - 1>(rows, vectors, p, first_row, accumulate, c);
}

// How many of the rows that are left to take at once. Rows are shared out evenly: a block of few rows does not hide the
// latency of a multiply-add.
DALLE_INLINE int rows_at_once(int64_t left) {
  const int64_t blocks = (left + MOST_ROWS - 1) / MOST_ROWS;
  return static_cast<int>((left + blocks - 1) / blocks);
}

template <Order ORDER, class Element>
DALLE_NOINLINE void multiply(const Product<Element>& p, int64_t rows, int vectors, bool accumulate, float* c) {
  for (int64_t first = 0; first < rows;) {
    const int block = rows_at_once(rows - first);
    multiply_rows<ORDER, MOST_ROWS>(block, vectors, p, first, accumulate, c + first * PANEL);
    first += block;
  }
}

}  // namespace dalle::DALLE_ISA_NAMESPACE
