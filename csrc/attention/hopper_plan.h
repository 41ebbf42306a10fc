// What the Hopper kernel does with a pattern: its tiles of 64 queries, and the steps of keys that each one takes. Plain
// arithmetic, on host and device; the mask itself is that of dalle_kernels/attention/pattern.py.
//
// A *place* is a token's rank among its own part of the stream, text or image, in the order in which tiles are cut. The
// image's is raster order, but for `column`: there a column takes `segment` places, a power of 2 up to 64, the last of
// them empty where the grid has fewer rows. So a tile is whole columns and one box of a tensor map. Where the last row
// is incomplete, the grid is moved: the first `missing` places of its first row are empty instead, and what lies in
// memory there is text, whose address is good. Tokens of one column stay in one.
#pragma once

#include "attention/attention.h"

namespace dalle {

constexpr int TILE = 64;  // queries of a tile, keys of a text tile

struct HopperPlan {
  PatternKind kind;  // causal where the sequence ends within the text: then all is image
  int text_len, image_len;
  int text_tiles, tiles;          // of a head: of text queries, which come first, and of all
  int rows, width, kernel_size;
  int segment, segment_bits;      // places of a column, or of a row for axial_row; and its logarithm, a column's alone
  int missing;                    // empty places of the moved grid's first row
  int step, steps;                // keys of a step of an image tile's window, and how many steps; but for causal
  int stages, text_slots;         // steps and text tiles that shared memory holds, of each warpgroup and of all
};

DALLE_INLINE int divided_up(int a, int b) { return (a + b - 1) / b; }

// Rows that are copied of a head's last text tile: 16 where it has no more tokens, as with the paper's 257.
constexpr int FEW = 16;
DALLE_INLINE int last_text_rows(const HopperPlan& plan) {
  return plan.text_len > 0 && (plan.text_len - 1) % TILE < FEW ? FEW : TILE;
}

// Whether query `query` of a tile of image queries sees the image key at place `key`, both counted from the tile's
// first place; of the tile's columns the first `hidden` have an empty first place.
DALLE_INLINE bool sees(const HopperPlan& plan, int query, int key, int hidden) {
  if (key > query) return false;
  const int distance = query - key, width = plan.width;
  switch (plan.kind) {
    case PatternKind::causal: return true;
    case PatternKind::row: return distance <= width;
    case PatternKind::column:
      return key >= query / plan.segment * plan.segment &&
             (key % plan.segment != 0 || key / plan.segment >= hidden);
    case PatternKind::axial_row: return key >= query / plan.segment * plan.segment;
    case PatternKind::conv: {
      const int reach = plan.kernel_size / 2;
      if (distance > reach * (width + 1)) return false;
      return 2 * reach + 1 >= width || (distance + reach) % width <= 2 * reach;
    }
    case PatternKind::conv_corner: {
      // Tiles begin at a row's start; keys before the tile are at negative places.
      const int shift = divided_up(TILE + plan.kernel_size * width, width);
      const int key_place = key + shift * width;
      const int row_distance = query / width + shift - key_place / width;
      const int column_distance = query % width - key_place % width;
      return row_distance < plan.kernel_size && column_distance >= 0 && column_distance < plan.kernel_size;
    }
  }
  return false;
}

// How far before its own first place a tile's window begins.
DALLE_INLINE int reach_back(const HopperPlan& plan) {
  switch (plan.kind) {
    case PatternKind::row: return plan.width;
    case PatternKind::conv: return plan.kernel_size / 2 * (plan.width + 1);
    case PatternKind::conv_corner: return (plan.kernel_size - 1) * plan.width;
    default: return 0;
  }
}

// The window's steps of the image tile whose first place is `first`: those numbered from `begin` to `end`, number s
// from place start + s * step on. They end with the tile. `step` is the plan's; a kernel knows it beforehand.
struct Window {
  int start, begin, end;
};
DALLE_INLINE Window window_of(const HopperPlan& plan, int step, int first) {
  const int end = plan.kind == PatternKind::causal ? first / TILE + 1 : plan.steps;
  const int start = first + TILE - end * step;
  return {start, start < 0 ? -start / step : 0, end};
}

// Masks of window steps, in the order of a table: for each of `mask_variants` first the steps'. A bit for each number
// that a thread has of a row of scores.
DALLE_INLINE int mask_variants(const HopperPlan& plan) { return plan.missing > 0 ? 3 : 1; }
DALLE_INLINE int masks_of(const HopperPlan& plan) {
  return plan.kind == PatternKind::causal ? 1 : mask_variants(plan) * plan.steps;
}

// Of the columns of the column tile that begins at `first`, how many have an empty first place: none, as many as in the
// one tile where they end, or all.
DALLE_INLINE int hidden_columns(const HopperPlan& plan, int variant) {
  const int columns = TILE / plan.segment;
  return variant == 0 ? 0 : variant == 1 ? plan.missing % columns : columns;
}
DALLE_INLINE int mask_variant(const HopperPlan& plan, int first) {
  if (plan.missing == 0) return 0;
  const int hidden = plan.missing - (first >> plan.segment_bits);
  return hidden <= 0 ? 0 : hidden < TILE >> plan.segment_bits ? 1 : 2;
}

// Number of the mask of step s, or -1 where all is seen.
DALLE_INLINE int mask_of(const HopperPlan& plan, int first, int s) {
  if (plan.kind == PatternKind::causal) return s == first / TILE ? 0 : -1;
  return mask_variant(plan, first) * plan.steps + s;
}

// The columns below `columns` of a step, as a mask: of every eight, thread `lane` of four has columns 2 * lane and
// 2 * lane + 1.
DALLE_INLINE uint32_t mask_below(int columns, int lane) {
  if (columns <= 0) return 0;
  const int rest = columns % 8 - 2 * lane;
  const int bits = columns / 8 * 2 + (rest < 0 ? 0 : rest > 2 ? 2 : rest);
  return bits >= 32 ? ~0u : (1u << bits) - 1;
}

// One thread's mask number `mask` of the table, for row `row` of the tile.
DALLE_INLINE uint32_t window_mask(const HopperPlan& plan, int mask, int row, int lane) {
  const bool causal = plan.kind == PatternKind::causal;
  const int steps = causal ? 1 : plan.steps, s = mask % steps;
  const int hidden = hidden_columns(plan, mask / steps), key = TILE - (steps - s) * plan.step;
  uint32_t bits = 0;
  for (int bit = 0; bit < plan.step / 4; ++bit) {
    bits |= static_cast<uint32_t>(sees(plan, row, key + bit / 2 * 8 + 2 * lane + bit % 2, hidden)) << bit;
  }
  return bits;
}

// The token at a place of the image, or of the text, and -1 where there is none.
DALLE_INLINE int token_of(const HopperPlan& plan, bool image, int place) {
  if (!image) return place < plan.text_len ? place : -1;
  if (plan.kind != PatternKind::column) return place < plan.image_len ? plan.text_len + place : -1;
  const int row = place & (plan.segment - 1), column = place >> plan.segment_bits;
  const int token = row * plan.width + column - plan.missing;
  return row < plan.rows && column < plan.width && token >= 0 ? plan.text_len + token : -1;
}

// What a tile takes, counted in keys: those that it visits, and what its queries and results take beside. Tiles of
// text, and of a causal image, take a tile more each; windows that the image's start cuts off count in full.
DALLE_INLINE int growing_tiles(const HopperPlan& plan) {
  return plan.kind == PatternKind::causal ? plan.tiles : plan.text_tiles;
}
DALLE_INLINE int64_t tile_cost(const HopperPlan& plan, int tile) {
  constexpr int BESIDE = 64;
  return (tile < growing_tiles(plan) ? (tile + 1) * TILE : plan.text_len + plan.steps * plan.step) + BESIDE;
}
DALLE_INLINE int64_t head_cost(const HopperPlan& plan) {
  int64_t cost = 0;
  for (int tile = 0; tile < growing_tiles(plan); ++tile) cost += tile_cost(plan, tile);
  return cost + (plan.tiles - growing_tiles(plan)) * tile_cost(plan, plan.tiles);
}

// Where share number `share` of `shares`, which take about the same each, begins among the tiles of `heads` heads, one
// after the other, each of which takes `cost`.
DALLE_INLINE int share_begin(const HopperPlan& plan, int64_t cost, int heads, int share, int shares) {
  const int64_t before = cost * heads * share / shares;
  const int head = static_cast<int>(before / cost);
  int64_t rest = before - head * cost;
  int tile = 0;
  for (; tile < growing_tiles(plan) && rest > 0; ++tile) rest -= tile_cost(plan, tile);
  if (rest > 0) tile += static_cast<int>((rest + tile_cost(plan, tile) - 1) / tile_cost(plan, tile));
  return head * plan.tiles + tile;
}

// Tile number `turn` of warpgroup `group` among the tiles of a block that begin at `first`. Every round they change
// places, or the same one would always have the longest.
DALLE_INLINE int tile_of_turn(int first, int turn, int group, int groups) {
  return first + turn * groups + (group + turn) % groups;
}

// ---- Shared memory of a block, from its start: K's and V's tiles of the same keys follow each other, and so do the
// two barriers, of 8 bytes, that every place has. Where there are as many places as text tiles, the last place is the
// last tile's, and has no room for more rows.
struct SharedLayout {
  int query_bytes, step_bytes;      // of one warpgroup's queries, and of the keys alone of a window's step,
  int text_bytes, last_text_bytes;  // a text tile and the last one
  int text, windows, barriers, text_barriers, window_barriers, mask_barrier, end_barrier, again,
      masks, end;
};
constexpr int MOST_SHARED = 227 << 10;
DALLE_INLINE SharedLayout shared_layout(const HopperPlan& plan, int head_dim, int groups) {
  SharedLayout layout{};
  layout.query_bytes = layout.text_bytes = TILE * head_dim * 2;
  layout.last_text_bytes = last_text_rows(plan) * head_dim * 2;
  layout.step_bytes = plan.step * head_dim * 2;
  layout.text = groups * layout.query_bytes;
  layout.windows = layout.text + plan.text_slots * 2 * layout.text_bytes;
  if (plan.text_slots == plan.text_tiles) layout.windows -= 2 * (layout.text_bytes - layout.last_text_bytes);
  layout.barriers = layout.windows + groups * plan.stages * 2 * layout.step_bytes;
  layout.text_barriers = layout.barriers + groups * 16;
  layout.window_barriers = layout.text_barriers + plan.text_slots * 16;
  layout.mask_barrier = layout.window_barriers + groups * plan.stages * 16;
  layout.end_barrier = layout.mask_barrier + 8;
  layout.again = layout.end_barrier + 8;
  layout.masks = layout.again + 16;
  layout.end = layout.masks + masks_of(plan) * 128 * 2 * static_cast<int>(sizeof(uint32_t));
  return layout;
}

// Fills in stages and text_slots: false if shared memory does not hold even one stage and a whole text. A second stage
// comes first, then room for the next head's text.
DALLE_INLINE bool fit_shared(HopperPlan& plan, int head_dim, int groups) {
  const bool single = plan.kind != PatternKind::causal && plan.steps == 1;
  for (plan.stages = single ? 1 : 2; plan.stages > 0; --plan.stages) {
    plan.text_slots = 2 * plan.text_tiles;
    while (plan.text_slots > plan.text_tiles && shared_layout(plan, head_dim, groups).end > MOST_SHARED) {
      --plan.text_slots;
    }
    if (shared_layout(plan, head_dim, groups).end <= MOST_SHARED) return true;
  }
  return false;
}

// All of a plan but `step` and what follows from it. nullptr, or why the kernel does not serve the pattern.
inline const char* plan_pattern(const Pattern& pattern, HopperPlan& plan) {
  if (pattern.seq > 1 << 24 || pattern.width > 1 << 24 || pattern.kernel_size > 1 << 12) {
    return "the Hopper kernel takes sequences of up to 2^24 tokens and kernel sizes of up to 2^12";
  }
  if (pattern.kernel_size * (pattern.width + 1) > 1 << 28) {
    return "the Hopper kernel takes windows of up to 2^28 tokens";
  }
  plan = {};
  plan.kind = pattern.kind;
  plan.text_len = static_cast<int>(pattern.text_len);
  if (pattern.kind == PatternKind::causal || pattern.seq <= pattern.text_len) {
    plan.kind = PatternKind::causal;
    plan.text_len = 0;
  }
  plan.image_len = static_cast<int>(pattern.seq) - plan.text_len;
  plan.width = static_cast<int>(pattern.width);
  plan.kernel_size = static_cast<int>(pattern.kernel_size);
  plan.rows = divided_up(plan.image_len, plan.width);
  plan.segment = 1;
  int places = plan.image_len;
  if (plan.kind == PatternKind::column) {
    while (plan.segment < plan.rows) plan.segment *= 2, ++plan.segment_bits;
    if (plan.segment > TILE) return "the Hopper kernel takes columns of up to 64 rows";
    plan.missing = plan.rows * plan.width - plan.image_len;
    if (plan.missing > plan.text_len) return "the Hopper kernel takes incomplete grids only after a longer text";
    places = plan.segment * plan.width;
  } else if (plan.kind == PatternKind::axial_row || plan.kind == PatternKind::conv_corner) {
    if (TILE % plan.width != 0) return "the Hopper kernel takes this pattern with widths that divide 64";
    plan.segment = plan.width;
  }
  plan.text_tiles = divided_up(plan.text_len, TILE);
  plan.tiles = plan.text_tiles + divided_up(places, TILE);
  return nullptr;
}

// Chooses, of `choices`, the step whose whole steps cover the window with the fewest keys, of those that leave shared
// memory for two stages, if there are any: without a second one each step waits for its keys.
template <int COUNT>
const char* plan_steps(HopperPlan& plan, const int (&choices)[COUNT], int head_dim, int groups) {
  HopperPlan best{};
  bool best_waits = false;
  for (int step : choices) {
    if (plan.kind == PatternKind::causal && step != TILE) continue;
    if (plan.kind == PatternKind::column && TILE % step != 0) continue;  // a box is whole columns, or a part of one
    plan.step = step;
    plan.steps = divided_up(TILE + reach_back(plan), step);
    if (!fit_shared(plan, head_dim, groups)) continue;
    const bool waits = plan.stages == 1 && plan.steps > 1, fewer = plan.steps * step < best.steps * best.step;
    if (best.step == 0 || (waits == best_waits ? fewer : best_waits)) best = plan, best_waits = waits;
  }
  if (best.step == 0) return "the text or the window does not fit into shared memory";
  plan = best;
  return nullptr;
}

}  // namespace dalle
