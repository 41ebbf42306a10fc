// Rows of tensors into the packed layouts of product.h, and back.
#pragma once

#include "attention/product.h"

namespace dalle::DALLE_ISA_NAMESPACE {

// Rows of one head are often far apart in memory (between them lie the other heads, and q, k, v of each), where the
// processor's own prefetcher does not follow. Where they are a multiple of 4 KiB apart, as a column's tokens are, all
// share a set of the L1 cache, usually of 8 ways: of more rows ahead the first would be gone before its turn.
constexpr int64_t ROWS_AHEAD = 6, CACHE_LINE = 64;

// A matrix [.., head_dim] of one head: element type T, rows `stride` elements apart.
template <class T>
struct Matrix {
  T* data;
  int64_t stride;
};

// Sizes along head_dim.
struct Columns {
  int64_t head_dim, blocks, width;  // blocks of PANEL floats; width: head_dim rounded up to whole blocks

  explicit Columns(int64_t head_dim_)
      : head_dim(head_dim_), blocks((head_dim_ + PANEL - 1) / PANEL), width(blocks * PANEL) {}

  int64_t of_block(int64_t block) const {
    const int64_t left = head_dim - block * PANEL;
    return left < PANEL ? left : PANEL;
  }
  int vectors(int64_t block) const { return of_block(block) > Vector::width ? 2 : 1; }
};

template <class T>
DALLE_INLINE void fetch_row(const Matrix<const T>& from, int32_t token, int64_t head_dim) {
  if (token < 0) return;
  const T* row = from.data + token * from.stride;
  for (int64_t d = 0; d < head_dim; d += CACHE_LINE / sizeof(T)) __builtin_prefetch(row + d);
}

// Rows `tokens[0..count)` of a matrix (zeros for token -1), times `factor`, as blocked rows; `to_rows` of them a block.
template <class T>
DALLE_NOINLINE void pack_rows(const Matrix<const T>& from, const int32_t* tokens, int64_t count, float factor,
                              const Columns& columns, float* to, int64_t to_rows) {
  const Vector scale = broadcast(factor);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t present = tokens[i] < 0 ? 0 : columns.head_dim;
    const T* row = tokens[i] < 0 ? from.data : from.data + tokens[i] * from.stride;
    if (i + ROWS_AHEAD < count) fetch_row(from, tokens[i + ROWS_AHEAD], columns.head_dim);
    for (int64_t d = 0; d < columns.width; d += Vector::width) {
      const Vector x = d < present ? load_first(row + d, present - d) : broadcast(0.0f);
      store(to + (d / PANEL * to_rows + i) * PANEL + d % PANEL, x * scale);
    }
  }
}

// The other way: blocked rows times `factor` (or row i's own factors[i]) to the rows of a matrix; token -1 is left out.
template <class T>
DALLE_NOINLINE void unpack_rows(const float* from, int64_t from_rows, const int32_t* tokens, int64_t count,
                                float factor, const float* factors, const Columns& columns, const Matrix<T>& to) {
  for (int64_t i = 0; i < count; ++i) {
    if (tokens[i] < 0) continue;
    const Vector scale = broadcast(factors != nullptr ? factors[i] : factor);
    T* row = to.data + tokens[i] * to.stride;
    for (int64_t d = 0; d < columns.head_dim; d += Vector::width) {
      store_first(row + d, columns.head_dim - d, load(from + (d / PANEL * from_rows + i) * PANEL + d % PANEL) * scale);
    }
  }
}

// PANEL blocked rows of `blocks` blocks to [block * PANEL + column][row].
DALLE_NOINLINE inline void transpose_panel(const float* from, int64_t blocks, float* to) {
  for (int64_t block = 0; block < blocks; ++block, from += PANEL * PANEL, to += PANEL * PANEL) {
    for (int64_t i = 0; i < PANEL; i += 8) {
      for (int64_t j = 0; j < PANEL; j += 8) transpose_8x8(from + i * PANEL + j, PANEL, to + j * PANEL + i, PANEL);
    }
  }
}

}  // namespace dalle::DALLE_ISA_NAMESPACE
