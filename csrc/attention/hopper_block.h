// What the warps of a block of the Hopper kernel share: the launch's parameters, places in shared memory, and the tiles
// that are the block's.
#pragma once

#include <cuda.h>

#include "attention/hopper_plan.h"
#include "common/hopper.h"
#include "common/pairs.h"

namespace dalle::cuda {
namespace {

// A block is a number of warpgroups that consume and one that produces, of which one warp works. That one gives
// registers to the others: how many a thread keeps.
template <int GROUPS>
constexpr int PRODUCER_REGISTERS = GROUPS == 2 ? 40 : 32;
template <int GROUPS>
constexpr int CONSUMER_REGISTERS = GROUPS == 2 ? 232 : 160;
template <int GROUPS>
constexpr int THREADS = (GROUPS + 1) * 128;

struct Operand {
  CUtensorMap text, image;
};

struct Launch {
  Operand q, k, v;
  CUtensorMap last_text[2];  // of keys and values, in boxes of a last text tile's rows
  HopperPlan plan;
  SharedLayout layout;
  int heads, seq, sign;
  bool careful;       // maxima rise from the start
  int all_heads;      // of all samples
  int64_t head_cost;  // of tiles (hopper_plan.h)
  float exponent;  // |scale| * log2(e)
  Heads out;
  float* lse;
};

// Where a block's shared memory has what. Of each pair of barriers the first says that data is there, the second, FREE
// bytes further, that nobody needs it any more.
[[maybe_unused]] constexpr uint32_t FREE = 8;

struct Shared {
  const SharedLayout& layout;
  const HopperPlan& plan;
  uint32_t start;

  __device__ uint32_t queries(int group) const { return start + group * layout.query_bytes; }
  __device__ uint32_t text_keys(int slot) const { return start + layout.text + slot * 2 * layout.text_bytes; }
  __device__ uint32_t window_keys(int group, int stage) const {
    return start + layout.windows + (group * plan.stages + stage) * 2 * layout.step_bytes;
  }
  __device__ uint32_t mask_barrier() const { return start + layout.mask_barrier; }
  __device__ uint32_t end_barrier() const { return start + layout.end_barrier; }
  __device__ volatile int& again() const { return *reinterpret_cast<volatile int*>(dynamic_shared() + layout.again); }
  __device__ uint32_t masks() const { return start + layout.masks; }
  __device__ uint32_t query_barrier(int group) const { return start + layout.barriers + 16 * group; }
  __device__ uint32_t text_barrier(int slot) const { return start + layout.text_barriers + 16 * slot; }
  __device__ uint32_t window_barrier(int group, int stage) const {
    return start + layout.window_barriers + 16 * (group * plan.stages + stage);
  }
};

// A place in a ring, and the parity of its round.
struct Ring {
  int place;
  uint32_t parity;
};
[[maybe_unused]] __device__ void advance(Ring& ring, int count) {
  if (++ring.place == count) ring.place = 0, ring.parity ^= 1;
}

// ---- Tiles of heads of any width: of all rows the first 64 columns, then the next ones.

// Asks for a box of rows of a tile, which has `rows`, at a corner of which [0] is left to this.
template <int HEAD_DIM>
__device__ void copy_tile(uint32_t to, int rows, const CUtensorMap& map, int (&corner)[5], uint32_t barrier) {
#pragma unroll
  for (int column = 0; column < HEAD_DIM; column += TILE_COLUMNS) {
    corner[0] = column;
    copy_box(to, &map, corner, barrier);
    to += rows * TILE_ROW_BYTES;
  }
}

// Sets corner[1] and [2], of rows in an operand's map, to those that begin at a place.
[[maybe_unused]] __device__ void set_rows(const HopperPlan& plan, bool image, int place, int (&corner)[5]) {
  const bool columns = image && plan.kind == PatternKind::column;
  corner[1] = columns ? place & (plan.segment - 1) : place;
  corner[2] = columns ? place >> plan.segment_bits : 0;
}

// Of 16 columns at a time, where they begin in a tile of ROWS rows.
template <int ROWS>
__device__ constexpr uint32_t depth_offset(int depth) {
  return depth / 4 * ROWS * TILE_ROW_BYTES + depth % 4 * 32;
}

// The left operand of a product, a tile's 64 rows, as a thread has them.
template <int WORDS>
__device__ void load_tile(uint32_t tile, uint32_t (&blocks)[WORDS]) {
  const uint32_t lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane % 16;
#pragma unroll
  for (int depth = 0; depth < WORDS / 4; ++depth) {
    const uint32_t columns = tile + depth / 4 * TILE * TILE_ROW_BYTES;
    load_blocks(columns + swizzled_offset(row, depth % 4 * 2 + lane / 16), blocks + 4 * depth);
  }
}

// A block's share of all heads' tiles, and the heads they belong to.
struct Share {
  int first, last, tiles;
  int first_head, last_head;
  __device__ explicit Share(const Launch& launch)
      : first(begin(launch, blockIdx.x)), last(begin(launch, blockIdx.x + 1)), tiles(launch.plan.tiles),
        first_head(first / tiles), last_head((last + tiles - 1) / tiles) {}
  static __device__ int begin(const Launch& launch, unsigned block) {
    return share_begin(launch.plan, launch.head_cost, launch.all_heads, block, gridDim.x);
  }
};

}  // namespace
}  // namespace dalle::cuda
