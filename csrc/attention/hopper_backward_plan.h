// What the Hopper kernels of the backward do with a pattern: who sees whom, in tiles of 64 places that a warpgroup owns
// and strips of 32 that pass by. Plain arithmetic, on host and device; places and plans are those of hopper_plan.h.
#pragma once

#include "attention/hopper_plan.h"
#include "common/hopper_layout.h"

namespace dalle {

constexpr int STRIP = 32;

// Strips number `begin` to `end` of one part of the stream, text or image.
struct Strips {
  int begin, end;
};

// Whether the places of a part see all that came before them in it.
DALLE_INLINE bool sees_all_before(const HopperPlan& plan, bool image) {
  return !image || plan.kind == PatternKind::causal;
}

DALLE_INLINE int tiles_of(const HopperPlan& plan, bool image) {
  return image ? plan.tiles - plan.text_tiles : plan.text_tiles;
}

// The keys, of their own part, that the queries of the tile at place `first` see.
DALLE_INLINE Strips keys_seen(const HopperPlan& plan, bool image, int first) {
  const int from = sees_all_before(plan, image) ? 0 : first - reach_back(plan);
  return {from < 0 ? 0 : from / STRIP, first / STRIP + TILE / STRIP};
}

// The queries, of their own part, that see the keys of the tile at place `first`.
DALLE_INLINE Strips queries_seeing(const HopperPlan& plan, bool image, int first) {
  const int all = tiles_of(plan, image) * (TILE / STRIP), last = divided_up(first + TILE + reach_back(plan), STRIP);
  return {first / STRIP, sees_all_before(plan, image) || last > all ? all : last};
}

// ---- Masks, of a tile and a strip that may not see each other whole: a word for each of 128 threads. Of its row of
// scores the thread has, of every 8 columns, 2 * lane and the next one: 8 bits. Above them are those of the row that is
// 8 further.
constexpr uint32_t ALL_SEEN = 0xffff;

// Fills in the strips of an image tile's window, masked ones all.
DALLE_INLINE void plan_strips(HopperPlan& plan) {
  plan.step = STRIP;
  plan.steps = TILE / STRIP + divided_up(reach_back(plan), STRIP);
}

// The table's order: the two strips of a tile that sees itself causally, then a window's strips, of queries in the
// order of keys for each variant of the mask, of keys in the order of queries.
DALLE_INLINE int query_masks(const HopperPlan& plan) {
  return TILE / STRIP + (plan.kind == PatternKind::causal ? 0 : mask_variants(plan) * plan.steps);
}
DALLE_INLINE int key_masks(const HopperPlan& plan) {
  return TILE / STRIP + (plan.kind == PatternKind::causal ? 0 : plan.steps);
}

// The mask of the queries at `first` for a strip of keys that they see, or -1 where all is seen.
DALLE_INLINE int query_mask(const HopperPlan& plan, bool image, int first, int strip) {
  const int ahead = strip - first / STRIP;
  if (sees_all_before(plan, image)) return ahead < 0 ? -1 : ahead;
  return mask_variant(plan, first) * plan.steps + ahead + plan.steps;
}

// The mask of the keys at `first` for a strip of queries that see them, or -1 where all is seen.
DALLE_INLINE int key_mask(const HopperPlan& plan, bool image, int first, int strip) {
  const int ahead = strip - first / STRIP;
  if (sees_all_before(plan, image)) return ahead < TILE / STRIP ? ahead : -1;
  return TILE / STRIP + ahead;
}

// One thread's word of a mask, of which bit(row, column) tells.
template <class Bit>
DALLE_INLINE uint32_t mask_word(int thread, const Bit& bit) {
  uint32_t word = 0;
  for (int i = 0; i < 16; ++i) {
    const int row = thread / 32 * 16 + thread % 32 / 4 + i / 8 * 8, column = i % 8 / 2 * 8 + thread % 4 * 2 + i % 2;
    word |= static_cast<uint32_t>(bit(row, column)) << i;
  }
  return word;
}

DALLE_INLINE uint32_t query_mask_word(const HopperPlan& plan, int mask, int thread) {
  const int strips = plan.steps, window = mask - TILE / STRIP;
  if (window < 0) return mask_word(thread, [&](int query, int key) { return mask * STRIP + key <= query; });
  const int hidden = hidden_columns(plan, window / strips), from = (window % strips - strips) * STRIP + TILE;
  return mask_word(thread, [&](int query, int key) { return sees(plan, query, from + key, hidden); });
}

// Keys that do not exist take what they get: nobody reads it.
DALLE_INLINE uint32_t key_mask_word(const HopperPlan& plan, int mask, int thread) {
  const int window = mask - TILE / STRIP;
  if (window < 0) return mask_word(thread, [&](int key, int query) { return key <= mask * STRIP + query; });
  return mask_word(thread, [&](int key, int query) {
    const int place = window * STRIP + query;  // `sees` counts from the query's tile
    return sees(plan, place % TILE, key - place / TILE * TILE, 0);
  });
}

// The word for the columns below `columns`, of all rows.
DALLE_INLINE uint32_t columns_below(int columns, int lane) {
  const uint32_t row = mask_below(columns, lane) & 0xff;
  return row << 8 | row;
}

// ---- Blocks: two warpgroups with neighbouring tiles of one part.
constexpr int PAIR = 2;

DALLE_INLINE int pairs_of(const HopperPlan& plan, bool image) { return divided_up(tiles_of(plan, image), PAIR); }

// A block's tiles, which begin at places `first` and first + TILE of their part of a head. There may be no second one.
struct PairOfTiles {
  int head;
  bool image;
  int first;
};

// Blocks of queries go head by head, the longest first.
DALLE_INLINE PairOfTiles pair_of_queries(const HopperPlan& plan, int block) {
  const int text = pairs_of(plan, false), pairs = text + pairs_of(plan, true), pair = pairs - 1 - block % pairs;
  const bool image = pair >= text;
  return {block / pairs, image, (image ? pair - text : pair) * PAIR * TILE};
}

// Blocks of keys: the text's take longest and come first. Where the image's are many, only every third block is one of
// the text, so that blocks that begin and end have one beside them that computes: up to 1 % of the time.
DALLE_INLINE PairOfTiles pair_of_keys(const HopperPlan& plan, int block, int heads) {
  const int text = pairs_of(plan, false), image = pairs_of(plan, true), stride = image >= 2 * text ? 3 : 1;
  const bool is_text = block < stride * heads * text && block % stride == 0;
  if (is_text) {
    const int pair = block / stride;
    return {pair / text, false, pair % text * PAIR * TILE};
  }
  const int text_before = block < stride * heads * text ? block / stride + 1 : heads * text, pair = block - text_before;
  return {pair / image, true, pair % image * PAIR * TILE};
}

DALLE_INLINE bool has_tile(const HopperPlan& plan, const PairOfTiles& pair, int group) {
  return pair.first / TILE + group < tiles_of(plan, pair.image);
}

// ---- Shared memory of a block, in bytes from its start: two tiles of each of OPERANDS operands, then a ring of STAGES
// places, a power of 2, for two operands' strips and, where these are of queries, their statistics, then the barriers.
// Strip number n goes to place n % STAGES. Of a tile or strip the first 64 columns of all rows come first.

// Of a query: its log-sum-exp in units of powers of 2, infinite where there is no query, and grad_out . out.
struct Statistics {
  float shift, delta;
};

template <int HEAD_DIM, int OPERANDS_, int STAGES_, bool STATISTICS>
struct PairLayout {
  static_assert((STAGES_ & (STAGES_ - 1)) == 0);
  static constexpr int OPERANDS = OPERANDS_, STAGES = STAGES_;
  static constexpr int TILE_BYTES = TILE * HEAD_DIM * 2, STRIP_BYTES = STRIP * HEAD_DIM * 2;
  static constexpr int OPERAND_BYTES = PAIR * TILE_BYTES, PLACE_BYTES = 2 * STRIP_BYTES;
  static constexpr int STATISTICS_BYTES = STATISTICS ? STRIP * static_cast<int>(sizeof(dalle::Statistics)) : 0;
  static constexpr int RING = OPERANDS * OPERAND_BYTES, RING_STATISTICS = RING + STAGES * PLACE_BYTES;
  static constexpr int RING_BARRIERS = RING_STATISTICS + STAGES * STATISTICS_BYTES;
  static constexpr int TILES_BARRIER = RING_BARRIERS + STAGES * 16, BYTES = TILES_BARRIER + 16;
};
template <int HEAD_DIM>
using QueryLayout = PairLayout<HEAD_DIM, 3, 4, false>;
template <int HEAD_DIM>
using KeyLayout = PairLayout<HEAD_DIM, 2, 8, true>;

template <class Layout>
DALLE_INLINE uint32_t tile_place(int operand, int group) {
  return operand * Layout::OPERAND_BYTES + group * Layout::TILE_BYTES;
}
template <class Layout>
DALLE_INLINE uint32_t strips_place(uint32_t n) {
  return Layout::RING + n % Layout::STAGES * Layout::PLACE_BYTES;
}
template <class Layout>
DALLE_INLINE uint32_t statistics_place(uint32_t n) {
  return Layout::RING_STATISTICS + n % Layout::STAGES * Layout::STATISTICS_BYTES;
}
// Of two barriers of 8 bytes: strips are there, and their place is free again.
template <class Layout>
DALLE_INLINE uint32_t barriers_place(uint32_t n) {
  return Layout::RING_BARRIERS + n % Layout::STAGES * 16;
}

}  // namespace dalle
