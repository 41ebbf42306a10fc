// A tile of queries against the keys it sees: scores, their softmax, and the three sums over them.
//
// Scores lie as [panel][key][PANEL]: queries side by side in the lanes, keys down the rows in the order of the panel's
// list. So keys and values are packed as plain rows, which serve as either operand; a list of keys may start and end
// anywhere; and a maximum or a sum over keys crosses no lanes. A tile meets all its keys before the softmax, without a
// running maximum: sparse patterns see few keys, the scores stay in cache, and the backward gets exact probabilities
// from the same code. The panels of a tile share their common keys (the text, most of the work) while these are in L1.
#pragma once

#include "attention/pack.h"
#include "attention/plan.h"
#include "common/vector_integer.h"

namespace dalle::DALLE_ISA_NAMESPACE {

constexpr int TILE_PANELS = 2;
constexpr int TILE_GROUPS = TILE_PANELS * ((PANEL + MOST_ROWS - 1) / MOST_ROWS);  // at most
// Terms that one accumulator takes before it is added to the rest: one long chain of additions in float32 would be less
// accurate than the matrix products of a good library. Errors of a score count most, for they are exponentiated.
constexpr int64_t PARTIAL_SCORE = 16, PARTIAL_SUM = 64;
constexpr float LOWEST = -3.40282347e38f;

struct View {
  const Plan& plan;
  const Tile& tile;

  const Panel& panel(int64_t g) const { return plan.panel[tile.first_panel + g]; }
  const int32_t* tokens(int64_t g) const { return plan.query_token + (tile.first_panel + g) * PANEL; }
  int vectors(int64_t g) const { return panel(g).queries > Vector::width ? 2 : 1; }
  int64_t keys(int64_t g) const { return tile.common_keys + panel(g).keys; }
  int64_t stride() const { return static_cast<int64_t>(plan.most_keys) * PANEL; }

  // Calls body(run, position of its first key in the panel's list) for each run beyond the common keys.
  template <class Body>
  void each_run(int64_t g, const Body& body) const {
    int64_t position = tile.common_keys;
    for (int32_t i = 0; i < panel(g).runs; ++i) {
      const Run& run = plan.run[panel(g).first_run + i];
      body(run, position);
      position += run.keys;
    }
  }

  // Calls body(panel, group) for the groups of each panel.
  template <class Body>
  void each_group(const Body& body) const {
    for (int64_t g = 0; g < tile.panels; ++g) {
      for (int32_t i = 0; i < panel(g).groups; ++i) body(g, plan.group[panel(g).first_group + i]);
    }
  }
};

// scores = rows of keys (or values; p.a, with a sum over head_dim given by p's chunks) times the tile's transposed
// queries (or output gradients), [panel][head_dim][PANEL], `size` apart.
template <class Element>
DALLE_NOINLINE void products(const View& view, Product<Element> p, const Element* transposed, int64_t size,
                             float* scores) {
  for (int64_t key = 0; key < view.tile.common_keys;) {
    const int rows = rows_at_once(view.tile.common_keys - key);
    for (int64_t g = 0; g < view.tile.panels; ++g) {
      p.b = transposed + g * size;
      float* c = scores + g * view.stride() + key * PANEL;
      multiply_rows<Order::by_row, MOST_ROWS>(rows, view.vectors(g), p, key, false, c);
    }
    key += rows;
  }
  const Element* a = p.a;
  for (int64_t g = 0; g < view.tile.panels; ++g) {
    p.b = transposed + g * size;
    view.each_run(g, [&](const Run& run, int64_t position) {
      p.a = a + run.first_key * PANEL;
      multiply<Order::by_row>(p, run.keys, view.vectors(g), false, scores + g * view.stride() + position * PANEL);
    });
  }
}

// x = 2^(factor * (x - largest)) for COUNT vectors x <= largest, side by side so that none waits for another; 0 below
// 2^-127 (also for an infinite x), NaN for NaN. `lowest` is -127 / factor. 2^f on [-1/2, 1/2] is a minimax polynomial
// of degree 6, of relative error 2e-9 before rounding.
template <int COUNT>
DALLE_INLINE void exp2_of_difference(Vector (&x)[COUNT], Vector factor, Vector lowest, const Vector (&largest)[COUNT]) {
  // Adding 1.5 * 2^23 rounds to a whole number; with 127 more, its low bits are the exponent of a power of two.
  const Vector shift = broadcast(12582912.0f + 127.0f);
  constexpr float COEFFICIENTS[] = {1.3398875e-3f, 9.61843692e-3f, 5.55033237e-2f, 0.240226477f, 0.693147182f, 1.0f};
  Vector power[COUNT], y[COUNT];
  for (int i = 0; i < COUNT; ++i) x[i] = maximum(lowest, x[i] - largest[i]);
  for (int i = 0; i < COUNT; ++i) power[i] = multiply_add(x[i], factor, shift);
  for (int i = 0; i < COUNT; ++i) x[i] = reduced_product(x[i], factor, shift - power[i]);
  for (int i = 0; i < COUNT; ++i) y[i] = broadcast(1.5353362e-4f);
  for (float c : COEFFICIENTS) {
    for (int i = 0; i < COUNT; ++i) y[i] = multiply_add(y[i], x[i], broadcast(c));
  }
  for (int i = 0; i < COUNT; ++i) x[i] = y[i] * as_float(shift_left<23>(as_integer(power[i])));
}

DALLE_INLINE void hide(const uint32_t* masks, int64_t keys, float* c) {
  const Vector hidden = broadcast(-__builtin_inff());
  for (int64_t i = 0; i < keys; ++i, c += PANEL) {
    store(c, select(masks[i], load(c), hidden));
    store(c + Vector::width, select(masks[i] >> Vector::width, load(c + Vector::width), hidden));
  }
}

// Scores [key][PANEL] of a panel, `end` floats, to unnormalized probabilities; COUNT vectors at a time.
template <int VECTORS, int COUNT>
DALLE_INLINE void exponentials(Vector factor, Vector lowest, const Vector (&largest)[VECTORS], float* scores,
                               Vector (&sum)[VECTORS]) {
  Vector p[COUNT], reference[COUNT];
  for (int i = 0; i < COUNT; ++i) {
    p[i] = load(scores + i / VECTORS * PANEL + i % VECTORS * Vector::width);
    reference[i] = largest[i % VECTORS];
  }
  exp2_of_difference(p, factor, lowest, reference);
  for (int i = 0; i < COUNT; ++i) {
    store(scores + i / VECTORS * PANEL + i % VECTORS * Vector::width, p[i]);
    sum[i % VECTORS] = sum[i % VECTORS] + p[i];
  }
}

template <int VECTORS>
DALLE_NOINLINE void softmax_lanes(float exponent, int64_t end, float* scores, float* maxima, float* sums) {
  constexpr int64_t PART = 32 * PANEL;  // keys whose sum is taken apart, for the same reason as PARTIAL_SUM
  constexpr int AT_ONCE = 4;
  constexpr int64_t STEP = AT_ONCE / VECTORS * PANEL;
  const Vector factor = broadcast(exponent), lowest = broadcast(-127.0f / exponent);
  Vector largest[VECTORS], sum[VECTORS], part[VECTORS];
  for (int v = 0; v < VECTORS; ++v) largest[v] = broadcast(LOWEST), sum[v] = broadcast(0.0f);
  for (int64_t i = 0; i < end; i += PANEL) {
    for (int v = 0; v < VECTORS; ++v) largest[v] = maximum(load(scores + i + v * Vector::width), largest[v]);
  }
  for (int64_t i = 0; i < end;) {
    const int64_t stop = i + PART < end ? i + PART : end;
    for (int v = 0; v < VECTORS; ++v) part[v] = broadcast(0.0f);
    for (; i + STEP <= stop; i += STEP) exponentials<VECTORS, AT_ONCE>(factor, lowest, largest, scores + i, part);
    for (; i < stop; i += PANEL) exponentials<VECTORS, VECTORS>(factor, lowest, largest, scores + i, part);
    for (int v = 0; v < VECTORS; ++v) sum[v] = sum[v] + part[v];
  }
  for (int v = 0; v < VECTORS; ++v) {
    store(maxima + v * Vector::width, largest[v]);
    store(sums + v * Vector::width, sum[v]);
  }
}

// One panel's scores to unnormalized probabilities exp(|scale| * (score - maximum)), 0 where hidden; `exponent` is
// |scale| * log2(e). Lanes without a query get some finite numbers.
DALLE_INLINE void softmax(const View& view, int64_t g, float exponent, float* scores, float* maxima, float* sums) {
  view.each_run(g, [&](const Run& run, int64_t position) {
    if (run.mask >= 0) hide(view.plan.key_mask + run.mask, run.keys, scores + position * PANEL);
  });
  const int64_t end = view.keys(g) * PANEL;
  if (view.vectors(g) == 2) return softmax_lanes<2>(exponent, end, scores, maxima, sums);
  softmax_lanes<1>(exponent, end, scores, maxima, sums);
}

// c [panel][block][query][PANEL] = scores times the blocked rows (of keys or values) that each group of queries sees.
// `chunks` is scratch for (most_spans + 1) of each group.
template <class Element>
DALLE_NOINLINE void weighted_sum(const View& view, const Columns& columns, const Element* scores, const Element* rows,
                                 Chunk* chunks, float* c) {
  constexpr int64_t PER = NUMBERS_IN<Element>;
  const int64_t most_chunks = view.plan.most_spans + 1;
  Chunk* chunk = chunks;
  view.each_group([&](int64_t, const Group& group) {
    chunk[0] = {0, 0, view.tile.common_keys / PER};
    for (int32_t i = 0; i < group.spans; ++i) {
      const Span& span = view.plan.span[group.first_span + i];
      chunk[1 + i] = {span.position / PER * PANEL, span.first_key / PER * PANEL, span.keys / PER};
    }
    chunk += most_chunks;
  });
  for (int64_t block = 0; block < columns.blocks; ++block) {
    const Element* b = rows + block * (view.plan.keys / PER) * PANEL;
    chunk = chunks;
    view.each_group([&](int64_t g, const Group& group) {
      const Product<Element> p{scores + g * view.stride(), b, chunk, group.spans + 1, PARTIAL_SUM};
      float* to = c + ((g * columns.blocks + block) * PANEL + group.first_query) * PANEL;
      multiply_rows<Order::by_step, MOST_ROWS>(group.queries, columns.vectors(block), p, group.first_query, false, to);
      chunk += most_chunks;
    });
  }
}

// sums (blocked rows of keys) += transpose of scores times the tile's blocked rows [panel][block][query][PANEL]: each
// key gathers from its queries.
template <class Element>
DALLE_NOINLINE void scatter_sum(const View& view, const Columns& columns, const Element* scores, const Element* rows,
                                float* sums) {
  constexpr int64_t PER = NUMBERS_IN<Element>;
  const int64_t block_size = PANEL / PER * PANEL;
  Chunk chunks[TILE_PANELS];
  for (int64_t g = 0; g < view.tile.panels; ++g) {
    chunks[g] = {g * view.stride(), g * columns.blocks * block_size, (view.panel(g).queries + PER - 1) / PER};
  }
  for (int64_t key = 0; key < view.tile.common_keys;) {
    const int count = rows_at_once(view.tile.common_keys - key);
    for (int64_t block = 0; block < columns.blocks; ++block) {
      const Product<Element> p{scores, rows + block * block_size, chunks, view.tile.panels, PARTIAL_SUM};
      float* c = sums + (block * view.plan.keys + key) * PANEL;
      multiply_rows<Order::by_row, MOST_ROWS>(count, columns.vectors(block), p, key, true, c);
    }
    key += count;
  }
  for (int64_t g = 0; g < view.tile.panels; ++g) {
    view.each_run(g, [&](const Run& run, int64_t position) {
      for (int64_t block = 0; block < columns.blocks; ++block) {
        const Product<Element> p{scores + position * PANEL, rows + block * block_size, chunks + g, 1, PARTIAL_SUM};
        float* c = sums + (block * view.plan.keys + run.first_key) * PANEL;
        multiply<Order::by_row>(p, run.keys, columns.vectors(block), true, c);
      }
    });
  }
}

}  // namespace dalle::DALLE_ISA_NAMESPACE
