// A pattern as work for kernels: tiles of queries, and for each the panels of keys that any of its queries sees.
//
// Queries are ordered text first, then the image: in raster order, or column by column where the pattern is `column`.
// Keys are in the same order, with the image starting a new panel, so that what one query sees is a few runs of
// neighbours. The plan depends on the pattern alone: every head of every sample shares it. It is compiled once, not per
// instruction set.
#pragma once

#include <cstdint>

#include "attention/attention.h"

namespace dalle {

struct Tile {
  int32_t first_row, rows;    // queries, in plan order; never both text and image
  int32_t first_slot, slots;  // its key panels
};

struct Plan {
  int64_t panels;              // key panels of the whole sequence
  const int32_t* key_token;    // [panels * panel_width]: which token a key is, -1 for padding
  const int32_t* query_token;  // [seq]: which token a query is
  int32_t tiles;
  const Tile* tile;
  const int32_t* slot_panel;  // ascending within a tile
  const int32_t* slot_mask;   // -1 where every row of the tile sees the whole panel, else the first of its rows' masks
  const uint32_t* row_mask;   // bit j: the row sees key j of the panel
  int32_t most_slots;         // of any tile

  // Cuts the tiles into `segments` runs of about equal work; run s is [cut(s), cut(s + 1)).
  int32_t cut(int32_t segment, int32_t segments) const;
};

// panel_width is at most 32. To be given back with delete_plan.
const Plan* new_plan(const Pattern& pattern, int panel_width, int tile_rows);
void delete_plan(const Plan* plan);

}  // namespace dalle
