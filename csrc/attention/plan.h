// A pattern as work for kernels: tiles of queries, and for each the keys that any of its queries sees.
//
// Keys are ordered text first, then the image: in raster order, or column by column where the pattern is `column`, so
// that what one query sees is a few runs of neighbours. Queries are cut into panels, as many as fill the lanes of one
// register block, which have one list of keys in common; which image queries share a panel (neighbours in that order,
// or a small rectangle of the grid) is chosen so that the lists are short. The plan depends on the pattern and the
// shape of panels alone: every head of every sample shares it, and so do later calls. It is compiled once, not per
// instruction set.
#pragma once

#include <cstdint>

#include "attention/attention.h"

namespace dalle {

// Neighbouring keys that some query of a panel sees.
struct Run {
  int32_t first_key, keys;
  int32_t mask;  // -1 where all of its queries see all of them, else where the keys' masks begin in key_mask
};

struct Panel {
  int32_t queries;              // real ones; the rest of its place in query_token is -1
  int32_t first_run, runs;      // keys beyond the tile's common ones
  int32_t keys;                 // in these runs
  int32_t first_group, groups;  // its queries, shared out evenly
};

// Neighbours among a panel's queries, which take the sum over keys together, and in `spans` the keys that any of them
// sees beyond the tile's common ones: fewer than the panel's.
struct Group {
  int32_t first_query, queries;
  int32_t first_span, spans;
};

struct Span {
  int32_t position;  // of the first key in the panel's list
  int32_t first_key, keys;
};

// Panels that share the keys [0, common_keys), seen by all of their queries.
struct Tile {
  int32_t first_panel, panels;
  int32_t common_keys;
  int32_t first_image_key, end_image_key;  // all image keys that the tile sees lie between
};

// How the plan is cut: queries in a panel (at most 32) and at most in a group, panels in a tile, and what runs and
// spans are a multiple of (1 or 2).
struct PlanShape {
  int panel_queries, group_queries, tile_panels, key_step;
};

struct Plan {
  int64_t keys;                // of the whole sequence, text and image each padded to whole key steps
  int64_t first_image_key;     // the end of the text
  const int32_t* key_token;    // [keys]: which token a key is, -1 for padding
  const int32_t* query_token;  // [panels * panel_queries]: which token a query is, -1 for padding
  const Panel* panel;
  const Run* run;              // ascending within a panel
  const Group* group;
  const Span* span;            // ascending within a group
  const uint32_t* key_mask;    // bit j: the panel's query j sees the key
  const Tile* tile;
  int32_t tiles;
  int32_t most_keys, most_spans;  // of any panel, of any group

  // Cuts the tiles into `segments` runs of about equal work; run s is [cut(s), cut(s + 1)).
  int32_t cut(int32_t segment, int32_t segments) const;
};

// Plans of the last few patterns are kept, for a call of few heads would spend more time on its plan than on its work.
// A borrowed plan stays whole until it is given back.
const Plan* borrow_plan(const Pattern& pattern, const PlanShape& shape);
void return_plan(const Plan* plan);

}  // namespace dalle
