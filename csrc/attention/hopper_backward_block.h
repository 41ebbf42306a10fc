// What both kernels of the Hopper backward share: the launch's parameters, the ring through which strips pass by, and
// rows on their way out.
#pragma once

#include "attention/hopper_backward_plan.h"
#include "attention/hopper_block.h"

namespace dalle::cuda {
namespace {

using namespace plain;

[[maybe_unused]] constexpr float LOG2E = 1.4426950408889634f;
[[maybe_unused]] constexpr int PAIR_THREADS = PAIR * 128;
// Blocks that share a multiprocessor: of heads of 64 two find their registers and shared memory there.
template <int HEAD_DIM>
constexpr int BLOCKS_BESIDE = HEAD_DIM == 64 ? 2 : 1;

struct BackwardLaunch {
  Operand q, k, v, out, grad_out;  // in boxes of a strip
  HopperPlan plan;
  int heads, all_heads, seq;
  float scale, exponent;  // scale * log2(e)
  Heads dq, dk, dv;
  const float* lse;
  Statistics* statistics;  // of each head plan.tiles * TILE: of text places, then of image places
  uint32_t* masks;  // [masks][128]: of queries, then of keys
};

struct HeadNumber {
  int all, sample, of_sample;
  __device__ HeadNumber(int head, int heads) : all(head), sample(head / heads), of_sample(head % heads) {}
};

// Asks for a strip's rows at a place of a head, as a part of a tile of `rows` rows.
template <int HEAD_DIM>
__device__ void copy_strip(uint32_t to, int rows, const Operand& operand, const HopperPlan& plan, const HeadNumber& head,
                           bool image, int place, uint32_t barrier) {
  int corner[5] = {0, 0, 0, head.of_sample, head.sample};
  set_rows(plan, image, place, corner);
  copy_tile<HEAD_DIM>(to, rows, image ? operand.image : operand.text, corner, barrier);
}

// The strips that a pair's block goes through: those of its own part that either tile needs, and then, which both do,
// `others` of the other part: the text of image queries, the image of text keys.
struct Course {
  Strips own;
  int others;
  __device__ int count() const { return own.end - own.begin + others; }
  __device__ bool is_own(int n) const { return n < own.end - own.begin; }
  __device__ int strip(int n) const { return is_own(n) ? own.begin + n : n - (own.end - own.begin); }
  // The numbers of the strips that one tile needs: of its own part, and of the other one if there is such a tile.
  __device__ Strips needed(const Strips& of_tile) const {
    return {of_tile.begin - own.begin, of_tile.end - own.begin};
  }
  __device__ Strips needed_others(bool exists) const { return {count() - (exists ? others : 0), count()}; }
};

// The ring of a layout. A thread asks for each strip AHEAD strips before its own warpgroup takes it; threads that have
// read a strip say so. The other warpgroup may be behind by STAGES - AHEAD before that thread has to wait for it.
template <class Layout>
struct RingOfStrips {
  static constexpr int STAGES = Layout::STAGES, AHEAD = STAGES > 4 ? STAGES - 3 : STAGES - 2;
  static_assert(STAGES >= 4);

  uint32_t memory;

  __device__ void init() const {
    for (uint32_t n = 0; n < STAGES; ++n) {
      barrier_init(barrier(n), 1);
      barrier_init(barrier(n) + FREE, PAIR_THREADS);
    }
  }
  __device__ uint32_t strips(uint32_t n) const { return memory + strips_place<Layout>(n); }
  __device__ uint32_t statistics(uint32_t n) const { return memory + statistics_place<Layout>(n); }
  __device__ uint32_t barrier(uint32_t n) const { return memory + barriers_place<Layout>(n); }

  // Once the place of strip n is free, makes it expect its bytes.
  __device__ void expect(uint32_t n) const {
    barrier_wait(barrier(n) + FREE, n / STAGES % 2 ^ 1);
    barrier_arrive_expecting(barrier(n), Layout::PLACE_BYTES + Layout::STATISTICS_BYTES);
  }
  __device__ void wait(uint32_t n) const { barrier_wait(barrier(n), n / STAGES % 2); }
  // Each thread for itself: of one that speaks for its warp after a __syncwarp racecheck does not see that the others
  // have read too.
  __device__ void release(uint32_t n) const { barrier_arrive(barrier(n) + FREE); }
};

// What a block does, whose two warpgroups own a tile each.
//
// `Derived` says which operands these are (tile_operand, strip_operand, copy_statistics) and what becomes of a strip
// (begin, mask_of_strip, take, end).
template <class Derived, int HEAD_DIM, class Layout>
struct PairBlock {
  using Ring = RingOfStrips<Layout>;

  const BackwardLaunch& launch;
  const HopperPlan& plan;
  const PairOfTiles pair;
  const HeadNumber head;
  const uint32_t memory;
  const int group;  // from a shuffle: so the compiler knows that a warp's threads agree on all that follows from it
  const int first;  // the warpgroup's tile begins at this place
  const bool exists;
  const Ring ring;

  __device__ PairBlock(const BackwardLaunch& launch_, const PairOfTiles& pair_)
      : launch(launch_), plan(launch_.plan), pair(pair_), head(pair.head, launch_.heads),
        memory(shared_address(dynamic_shared())), group(__shfl_sync(~0u, threadIdx.x / 128, 0)),
        first(pair.first + group * TILE), exists(has_tile(plan, pair, group)), ring{memory} {}

  __device__ Derived& derived() { return static_cast<Derived&>(*this); }
  __device__ uint32_t tile(int operand) const { return memory + tile_place<Layout>(operand, group); }
  __device__ uint32_t tiles_barrier() const { return memory + Layout::TILES_BARRIER; }

  __device__ void init() const {
    if (threadIdx.x == 0) {
      barrier_init(tiles_barrier(), 1);
      ring.init();
      barrier_init_done();
    }
    __syncthreads();
  }

  __device__ void ask_tiles() {
    if (threadIdx.x != 0) return;
    barrier_arrive_expecting(tiles_barrier(), Layout::OPERANDS * Layout::OPERAND_BYTES);
    for (int operand = 0; operand < Layout::OPERANDS; ++operand) {
      for (int row = 0; row < PAIR * TILE; row += STRIP) {
        const uint32_t to = memory + tile_place<Layout>(operand, row / TILE) + row % TILE * TILE_ROW_BYTES;
        copy_strip<HEAD_DIM>(to, TILE, derived().tile_operand(operand), plan, head, pair.image, pair.first + row,
                             tiles_barrier());
      }
    }
  }

  // Asks for strip n, if there is one.
  __device__ void ask(const Course& course, int n) {
    if (threadIdx.x == 0 && n < course.count()) {
      const bool image = course.is_own(n) == pair.image;
      const int place = course.strip(n) * STRIP;
      ring.expect(n);
      for (int i = 0; i < 2; ++i) {
        copy_strip<HEAD_DIM>(ring.strips(n) + i * Layout::STRIP_BYTES, STRIP, derived().strip_operand(i), plan, head,
                             image, place, ring.barrier(n));
      }
      derived().copy_statistics(n, image, place);
    }
    __syncwarp();
  }

  __device__ void take_all(const Course& course, const Strips& needed) {
    for (int n = needed.begin; n < needed.end; ++n) {
      const uint32_t mask = derived().mask_of_strip(course, n);
      ring.wait(n);
      derived().take(course, n, mask);
    }
  }
  // Strips that the other warpgroup alone needs.
  __device__ void pass(const Course& course, int begin, int end) {
    for (int n = begin; n < end; ++n) {
      ring.wait(n);
      ring.release(n);
      ask(course, n + Ring::AHEAD);
    }
  }

  // `seen` are the strips of its own part that the warpgroup's tile needs.
  __device__ void run(const Course& course, const Strips& seen) {
    init();
    ask_tiles();
    for (int n = 0; n < Ring::AHEAD; ++n) ask(course, n);
    barrier_wait(tiles_barrier(), 0);
    derived().begin();
    const Strips own = course.needed(seen), others = course.needed_others(exists);
    pass(course, 0, own.begin);
    take_all(course, own);
    pass(course, own.end, others.begin);
    take_all(course, others);
    if (exists) derived().end();
  }
};

// results = left, 64 rows of which left(depth) gives 16 columns, times the transpose of a strip.
template <class Element, int HEAD_DIM, class Left>
__device__ __forceinline__ void multiply_strip(float (&results)[STRIP / 2], const Left& left, uint64_t strip) {
  multiply_32<true>(Element{}, results, left(0), strip);
#pragma unroll
  for (int depth = 1; depth < HEAD_DIM / 16; ++depth) {
    multiply_32<false>(Element{}, results, left(depth), moved(strip, depth_offset<STRIP>(depth)));
  }
  products_commit();
}

// sums += left, 64 rows of STRIP numbers, times the rows of a strip.
template <class Element, int COUNT>
__device__ __forceinline__ void add_strip(float (&sums)[COUNT], const uint32_t (&left)[STRIP / 4], uint64_t strip) {
  products_begin();
#pragma unroll
  for (int row = 0; row < STRIP; row += 16) {
#pragma unroll
    for (int column = 0; column < 2 * COUNT; column += TILE_COLUMNS) {
      const uint32_t offset = depth_offset<STRIP>(column / 16) + row * TILE_ROW_BYTES;
      multiply<Right::rows, TILE_COLUMNS>(Element{}, sums + column / 2, left + row / 4, moved(strip, offset), true);
    }
  }
  products_commit();
}

__device__ inline uint32_t mask_at(const BackwardLaunch& launch, int mask) {
  return mask < 0 ? ALL_SEEN : __ldg(launch.masks + mask * 128 + threadIdx.x % 128);
}

// Writes the rows of a tile that exist, times `factor`.
template <class Element, int COUNT>
__device__ void store_tile(const BackwardLaunch& launch, const HeadNumber& head, bool image, int first, const Heads& to,
                           const float (&sums)[COUNT], float factor) {
  const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane / 4;
  Element* start = static_cast<Element*>(to.data) + head.sample * to.batch_stride + head.of_sample * to.head_stride +
                   lane % 4 * 8;
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    const int token = token_of(launch.plan, image, first + row + 8 * which);
#pragma unroll
    for (int column = 0; column < 2 * COUNT; column += 32) {
      uint32_t pieces[1][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = sums + column / 2 + 4 * i + 2 * which;
        pieces[0][i] = rounded_pair(pair[0] * factor, pair[1] * factor, Element{});
      }
      transpose_pieces(pieces);
      if (token >= 0) store_16_bytes(start + token * to.token_stride + column, pieces[0]);
    }
  }
}

}  // namespace
}  // namespace dalle::cuda
