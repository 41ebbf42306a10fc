// What forward and backward are made of: packing rows into blocks, one matrix product, and the softmax of a tile.
//
// Everything is float32 in two layouts whose innermost run is one panel (two registers) wide, so that the product
// streams:
// - blocked rows [block][row][PANEL]: a matrix [rows, head_dim] cut into blocks of PANEL columns, the last padded by 0;
// - transposed panels [panel][column][PANEL]: PANEL keys side by side for each column of head_dim.
// A tile of queries is taken against all key panels it sees before the softmax, not block by block with a running
// maximum: sparse patterns see few keys, the scores stay in cache, and the backward gets exact probabilities from the
// same code.
#pragma once

#include "attention/attention.h"
#include "attention/plan.h"
#include "common/vector.h"

namespace dalle::DALLE_ISA_NAMESPACE {

// A call costs nothing beside the loops in here, and a copy at every place of use costs minutes of compiling.
#define DALLE_NOINLINE __attribute__((noinline))

constexpr int PANEL = 2 * Vector::width;
constexpr int TILE_ROWS = 24;
// Rows of a register block: with two registers of columns, as many accumulators as leave room for the operands.
constexpr int MOST_ROWS = Vector::width == 16 ? 12 : 6;
// Rows of one head are often far apart in memory (between them lie the other heads, and q, k, v of each), where the
// processor's own prefetcher does not follow.
constexpr int64_t ROWS_AHEAD = 16, CACHE_LINE = 64;
// Terms that one accumulator takes before it is added to the rest: one long chain of additions in float32 would be less
// accurate than the matrix products of a good library.
constexpr int64_t PARTIAL_SUM = 16;
constexpr float LOWEST = -3.40282347e38f;

struct Dimensions {
  int64_t head_dim, blocks, width;  // width: head_dim rounded up to whole blocks
  int64_t keys;                     // rounded up to whole panels

  Dimensions(int64_t head_dim_, const Plan& plan)
      : head_dim(head_dim_),
        blocks((head_dim_ + PANEL - 1) / PANEL),
        width(blocks * PANEL),
        keys(plan.panels * PANEL) {}
};

// One matrix product C[r][0..PANEL) (+)= sum_t A[r][t] B[t][0..PANEL), the sum taken in chunks whose place in B may be
// given by an index (the key panels that a tile sees).
struct Product {
  const float* a;
  int64_t a_row, a_step, a_chunk;
  const float* b;  // steps PANEL apart
  int64_t b_chunk;
  const int32_t* chunk_index;  // nullptr: 0, 1, 2, ...
  int64_t chunk_length, length;
};

template <int ROWS>
DALLE_NOINLINE void multiply_block(const Product& p, int64_t first_row, bool accumulate, float* c) {
  const float* a_chunk = p.a + first_row * p.a_row;
  int64_t left = p.length;
  for (int64_t chunk = 0; left > 0; accumulate = true) {
    Vector sum[ROWS][2];
    for (int r = 0; r < ROWS; ++r) sum[r][0] = sum[r][1] = broadcast(0.0f);
    for (int64_t part = 0; part < PARTIAL_SUM && left > 0; part += p.chunk_length, left -= p.chunk_length) {
      const float* a = a_chunk;
      const float* b = p.b + (p.chunk_index != nullptr ? p.chunk_index[chunk] : chunk) * p.b_chunk;
      const int64_t steps = left < p.chunk_length ? left : p.chunk_length;
      for (int64_t t = 0; t < steps; ++t, a += p.a_step, b += PANEL) {
        const Vector b0 = load(b), b1 = load(b + Vector::width);
        for (int r = 0; r < ROWS; ++r) {
          const Vector value = broadcast(a[r * p.a_row]);
          sum[r][0] = multiply_add(value, b0, sum[r][0]);
          sum[r][1] = multiply_add(value, b1, sum[r][1]);
        }
      }
      a_chunk += p.a_chunk, ++chunk;
    }
    float* to = c + first_row * PANEL;
    for (int r = 0; r < ROWS; ++r, to += PANEL) {
      store(to, accumulate ? load(to) + sum[r][0] : sum[r][0]);
      store(to + Vector::width, accumulate ? load(to + Vector::width) + sum[r][1] : sum[r][1]);
    }
  }
}

template <int ROWS>
DALLE_INLINE void multiply_any(int rows, const Product& p, int64_t first_row, bool accumulate, float* c) {
  if (rows == ROWS) return multiply_block<ROWS>(p, first_row, accumulate, c);
  if constexpr (ROWS > 1) multiply_any<ROWS - 1>(rows, p, first_row, accumulate, c);
}

// C has `rows` rows, PANEL apart. Leftover rows are shared out evenly: a block of few rows does not hide the latency of
// a multiply-add.
DALLE_NOINLINE inline void multiply(const Product& p, int64_t rows, bool accumulate, float* c) {
  for (int64_t first = 0; first < rows;) {
    const int64_t left = rows - first;
    const int block = left <= MOST_ROWS ? left : left < MOST_ROWS + MOST_ROWS / 2 ? (left + 1) / 2 : MOST_ROWS;
    multiply_any<MOST_ROWS>(block, p, first, accumulate, c);
    first += block;
  }
}

template <class T>
DALLE_INLINE void fetch_row(const T* from, int64_t stride, int32_t token, const Dimensions& dims) {
  if (token < 0) return;
  for (int64_t d = 0; d < dims.head_dim; d += CACHE_LINE / sizeof(T)) __builtin_prefetch(from + token * stride + d);
}

template <class T>
DALLE_INLINE void fetch_rows(const T* from, int64_t stride, const int32_t* tokens, int64_t count,
                             const Dimensions& dims) {
  for (int64_t i = 0; i < count; ++i) fetch_row(from, stride, tokens[i], dims);
}

// Rows `tokens[0..count)` of a matrix (zeros for token -1), times `factor`, as blocked rows; `to_rows` of them a block.
template <class T>
DALLE_NOINLINE void pack_rows(const T* from, int64_t stride, const int32_t* tokens, int64_t count, float factor,
                              const Dimensions& dims, float* to, int64_t to_rows) {
  const Vector scale = broadcast(factor);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t columns = tokens[i] < 0 ? 0 : dims.head_dim;
    const T* row = tokens[i] < 0 ? from : from + tokens[i] * stride;
    if (i + ROWS_AHEAD < count) fetch_row(from, stride, tokens[i + ROWS_AHEAD], dims);
    for (int64_t d = 0; d < dims.width; d += Vector::width) {
      const Vector x = d < columns ? load_first(row + d, columns - d) : broadcast(0.0f);
      store(to + (d / PANEL * to_rows + i) * PANEL + d % PANEL, x * scale);
    }
  }
}

// The other way: blocked rows times `factor` (or row i's own factors[i]) to the rows of a matrix; token -1 is left out.
template <class T>
DALLE_NOINLINE void unpack_rows(const float* from, int64_t from_rows, const int32_t* tokens, int64_t count,
                                float factor, const float* factors, const Dimensions& dims, T* to, int64_t stride) {
  for (int64_t i = 0; i < count; ++i) {
    if (tokens[i] < 0) continue;
    const Vector scale = broadcast(factors != nullptr ? factors[i] : factor);
    T* row = to + tokens[i] * stride;
    for (int64_t d = 0; d < dims.head_dim; d += Vector::width) {
      store_first(row + d, dims.head_dim - d, load(from + (d / PANEL * from_rows + i) * PANEL + d % PANEL) * scale);
    }
  }
}

// All keys of a head as transposed panels; `rows` is scratch for one panel.
template <class T>
DALLE_NOINLINE void pack_panels(const T* from, int64_t stride, const Plan& plan, const Dimensions& dims, float* rows,
                                float* to) {
  for (int64_t panel = 0; panel < plan.panels; ++panel, to += dims.width * PANEL) {
    const int32_t* tokens = plan.key_token + panel * PANEL;
    if (panel + 1 < plan.panels) fetch_rows(from, stride, tokens + PANEL, PANEL, dims);
    pack_rows(from, stride, tokens, PANEL, 1.0f, dims, rows, PANEL);
    for (int64_t d = 0; d < dims.width; d += 8) {
      const float* block = rows + d / PANEL * PANEL * PANEL + d % PANEL;
      for (int64_t j = 0; j < PANEL; j += 8) transpose_8x8(block + j * PANEL, PANEL, to + d * PANEL + j, PANEL);
    }
  }
}

// Product of the tile's rows (blocked) with one panel of transposed keys or values, into PANEL columns of its scores.
struct TileScores {
  const Plan& plan;
  const Dimensions& dims;
  const Tile& tile;
  const int32_t* panels() const { return plan.slot_panel + tile.first_slot; }
  int64_t columns() const { return static_cast<int64_t>(tile.slots) * PANEL; }

  DALLE_NOINLINE void slot_product(int64_t slot, const float* rows, const float* transposed, float* c) const {
    const float* b = transposed + panels()[slot] * dims.width * PANEL;
    const Product p{rows, PANEL, 1, TILE_ROWS * PANEL, b, PANEL * PANEL, nullptr, PANEL, dims.head_dim};
    multiply(p, tile.rows, false, c);
  }

  // scores [slot][row][PANEL] = unnormalized probabilities, from queries (blocked, times the sign of scale) and
  // transposed keys: exp(|scale| * (q . k - maximum)), 0 where hidden. `exponent` is |scale| * log2(e).
  DALLE_NOINLINE void probabilities(const float* queries, const float* keys, double exponent, float* scores,
                                    float* maxima, float* sums) const {
    Vector largest[TILE_ROWS];
    for (int r = 0; r < TILE_ROWS; ++r) largest[r] = broadcast(LOWEST);
    for (int64_t slot = 0; slot < tile.slots; ++slot) {
      float* c = scores + slot * TILE_ROWS * PANEL;
      slot_product(slot, queries, keys, c);
      const int32_t mask = plan.slot_mask[tile.first_slot + slot];
      if (mask >= 0) hide(plan.row_mask + mask, c);
      for (int64_t r = 0; r < tile.rows; ++r) {
        largest[r] = maximum(largest[r], maximum(load(c + r * PANEL), load(c + r * PANEL + Vector::width)));
      }
    }
    Vector sum[TILE_ROWS], reference[TILE_ROWS];
    for (int64_t r = 0; r < tile.rows; ++r) {
      maxima[r] = largest_lane(largest[r]);
      reference[r] = broadcast(maxima[r]);
      sum[r] = broadcast(0.0f);
    }
    const Factor factor(exponent);
    for (int64_t slot = 0; slot < tile.slots; ++slot) {
      float* c = scores + slot * TILE_ROWS * PANEL;
      for (int64_t r = 0; r < tile.rows; ++r, c += PANEL) {
        const Vector p0 = exp2_of_product(load(c) - reference[r], factor);
        const Vector p1 = exp2_of_product(load(c + Vector::width) - reference[r], factor);
        store(c, p0);
        store(c + Vector::width, p1);
        sum[r] = sum[r] + (p0 + p1);
      }
    }
    for (int64_t r = 0; r < tile.rows; ++r) sums[r] = sum_of_lanes(sum[r]);
  }

  // c (blocked, TILE_ROWS a block) = scores times the blocked rows (keys or values) that the tile sees.
  DALLE_NOINLINE void weighted_sum(const float* scores, const float* rows, float* c) const {
    for (int64_t block = 0; block < dims.blocks; ++block) {
      const float* b = rows + block * dims.keys * PANEL;
      const Product p{scores, PANEL, 1, TILE_ROWS * PANEL, b, PANEL * PANEL, panels(), PANEL, columns()};
      multiply(p, tile.rows, false, c + block * TILE_ROWS * PANEL);
    }
  }

  // sums (blocked rows of keys) += transpose of scores times the tile's blocked rows: each key gathers from its
  // queries.
  DALLE_NOINLINE void scatter_sum(const float* scores, const float* rows, float* sums) const {
    for (int64_t slot = 0; slot < tile.slots; ++slot) {
      const float* a = scores + slot * TILE_ROWS * PANEL;
      for (int64_t block = 0; block < dims.blocks; ++block) {
        const float* b = rows + block * TILE_ROWS * PANEL;
        const Product p{a, 1, PANEL, 0, b, 0, nullptr, TILE_ROWS, tile.rows};
        multiply(p, PANEL, true, sums + (block * dims.keys + panels()[slot] * PANEL) * PANEL);
      }
    }
  }

 private:
  void hide(const uint32_t* row_masks, float* c) const {
    const Vector hidden = broadcast(-__builtin_inff());
    for (int64_t r = 0; r < tile.rows; ++r, c += PANEL) {
      store(c, select(row_masks[r], load(c), hidden));
      store(c + Vector::width, select(row_masks[r] >> Vector::width, load(c + Vector::width), hidden));
    }
  }
};

}  // namespace dalle::DALLE_ISA_NAMESPACE
