// The Hopper kernel of dk and dv: a warpgroup owns a tile of 64 keys and takes it through the queries that see them.
// Scores have a key a row, so that weights and gradients of scores are left operands as they come.
#pragma once

#include "attention/hopper_backward_block.h"

namespace dalle::cuda {
namespace {

// Shared memory of a block, from its start.
struct KeyLayout {
  using Ring = RingOfStrips<8, true>;
  static constexpr int K = 0, V = PAIR * TILE_BYTES, RING = 2 * V;
  static constexpr int TILES = RING + Ring::BYTES, END = TILES + 16;  // the barrier of the tiles
};

template <class Element>
struct KeyGradients {
  const BackwardLaunch& launch;
  const HopperPlan& plan;
  const PairOfTiles pair;
  const HeadNumber head;
  const uint32_t memory;
  const int group, first;
  Strips seeing{};
  Course course{};
  KeyLayout::Ring ring;
  float key_sums[HEAD / 2], value_sums[HEAD / 2];

  __device__ KeyGradients(const BackwardLaunch& launch_, uint32_t memory_)
      : launch(launch_), plan(launch_.plan), pair(pair_of_keys(plan, blockIdx.x, launch_.all_heads)),
        head(pair.head, launch_.heads), memory(memory_), group(__shfl_sync(~0u, threadIdx.x / 128, 0)),
        first(pair.first + group * TILE), ring{memory_ + KeyLayout::RING} {
    course.own = queries_seeing(plan, pair.image, pair.first);
    seeing = {course.own.begin, course.own.begin};
    if (has_tile(plan, pair, group)) seeing = queries_seeing(plan, pair.image, first);
    if (has_tile(plan, pair, 1)) course.own.end = queries_seeing(plan, pair.image, pair.first + TILE).end;
    course.others = pair.image ? 0 : tiles_of(plan, true) * (TILE / STRIP);
  }

  __device__ uint32_t tile(int operand) const { return memory + operand + group * TILE_BYTES; }

  __device__ void init() const {
    if (threadIdx.x == 0) {
      barrier_init(memory + KeyLayout::TILES, 1);
      ring.init();
      barrier_init_done();
    }
    __syncthreads();
  }

  __device__ void ask_tiles() const {
    if (threadIdx.x != 0) return;
    const uint32_t barrier = memory + KeyLayout::TILES;
    barrier_arrive_expecting(barrier, 2 * PAIR * TILE_BYTES);
    for (int i = 0; i < PAIR; ++i) {
      const int place = pair.first + i * TILE, bytes = i * TILE_BYTES;
      copy_tile(memory + KeyLayout::K + bytes, launch.k, plan, head, pair.image, place, barrier);
      copy_tile(memory + KeyLayout::V + bytes, launch.v, plan, head, pair.image, place, barrier);
    }
  }

  // Asks for strip n, if there is one.
  __device__ void ask(int n) const {
    if (threadIdx.x == 0 && n < course.count()) {
      const bool image = pair.image || !course.is_own(n);
      const int place = course.strip(n) * STRIP;
      ring.expect(n);
      copy_strip(ring.strips(n), launch.q, plan, head, image, place, ring.barrier(n));
      copy_strip(ring.strips(n) + STRIP_BYTES, launch.grad_out, plan, head, image, place, ring.barrier(n));
      const int64_t from = static_cast<int64_t>(head.all) * plan.tiles * TILE + (image ? plan.text_tiles * TILE : 0);
      copy_bytes(ring.statistics(n), launch.statistics + from + place, STATISTICS_BYTES, ring.barrier(n));
    }
    __syncwarp();
  }

  // The statistics of a thread's two columns among eight.
  __device__ float4 statistics(int n, int columns) const {
    return load_four(ring.statistics(n) + (columns * 8 + threadIdx.x % 4 * 2) * sizeof(Statistics));
  }

  // Scores to weights; of 8 columns that none of the warp's rows is seen from there are no exponentials.
  __device__ void weigh(int n, float (&scores)[STRIP / 2], uint32_t mask) const {
    const bool all = __all_sync(~0u, mask == ALL_SEEN);
    const uint32_t any = __reduce_or_sync(~0u, mask | mask >> 8);
#pragma unroll
    for (int columns = 0; columns < STRIP / 8; ++columns) {
      float* some = scores + 4 * columns;
      if ((any >> 2 * columns & 3) == 0) {
#pragma unroll
        for (int i = 0; i < 4; ++i) some[i] = 0;
        continue;
      }
      const float4 at = statistics(n, columns);
#pragma unroll
      for (int i = 0; i < 4; ++i) some[i] = fmaf(some[i], launch.exponent, i % 2 ? -at.z : -at.x);
      if (!all) {
#pragma unroll
        for (int i = 0; i < 4; ++i) some[i] = mask >> (i / 2 * 8 + 2 * columns + i % 2) & 1 ? some[i] : -INFINITY;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) some[i] = exp2_approximate(some[i]);
    }
  }

  // Gradients of the scaled scores, rounded.
  __device__ void differentiate(int n, const float (&weights)[STRIP / 2], const float (&grad_weights)[STRIP / 2],
                                uint32_t (&grad_scores)[STRIP / 4]) const {
#pragma unroll
    for (int columns = 0; columns < STRIP / 8; ++columns) {
      const float4 at = statistics(n, columns);
#pragma unroll
      for (int i = 4 * columns; i < 4 * columns + 4; i += 2) {
        grad_scores[i / 2] = packed(Element{}, weights[i] * (grad_weights[i] - at.y),
                                    weights[i + 1] * (grad_weights[i + 1] - at.w));
      }
    }
  }

  // sums += weights, whose rows are keys, times a strip of rows.
  __device__ void add(float (&sums)[HEAD / 2], const uint32_t (&weights)[STRIP / 4], uint64_t rows) const {
    products_begin();
#pragma unroll
    for (int query = 0; query < STRIP; query += 16) {
      multiply<Right::rows, HEAD>(Element{}, sums, weights + query / 4, moved(rows, query * TILE_ROW_BYTES), true);
    }
    products_commit();
  }

  __device__ void take(int n, uint32_t mask) {
    const uint64_t queries = tile_descriptor(ring.strips(n)), grads = moved(queries, STRIP_BYTES);
    const uint64_t keys = tile_descriptor(tile(KeyLayout::K)), values = tile_descriptor(tile(KeyLayout::V));
    float weights[STRIP / 2], grad_weights[STRIP / 2];
    products_begin();
    multiply_strip<Element>(weights, [&](int depth) { return moved(keys, 32 * depth); }, queries);
    multiply_strip<Element>(grad_weights, [&](int depth) { return moved(values, 32 * depth); }, grads);
    products_wait_but<1>();
    pin(weights);
    ask(n + KeyLayout::Ring::AHEAD);
    weigh(n, weights, mask);
    uint32_t rounded[STRIP / 4];
#pragma unroll
    for (int i = 0; i < STRIP / 4; ++i) rounded[i] = packed(Element{}, weights[2 * i], weights[2 * i + 1]);
    products_wait();
    pin(grad_weights);
    add(value_sums, rounded, grads);
    uint32_t grad_scores[STRIP / 4];
    differentiate(n, weights, grad_weights, grad_scores);
    add(key_sums, grad_scores, queries);
    products_wait();
    pin(value_sums);
    pin(key_sums);
    ring.release(n);
  }

  __device__ uint32_t mask_of_strip(int n) const {
    const int mask = course.is_own(n) ? key_mask(plan, pair.image, first, course.strip(n)) : -1;
    return mask_at(launch, mask < 0 ? -1 : query_masks(plan) + mask);
  }

  __device__ void take_all(const Strips& strips) {
    for (int n = strips.begin; n < strips.end; ++n) {
      const uint32_t mask = mask_of_strip(n);
      ring.wait(n);
      take(n, mask);
    }
  }
  __device__ void pass(int begin, int end) const {
    for (int n = begin; n < end; ++n) {
      ring.wait(n);
      ring.release(n);
      ask(n + KeyLayout::Ring::AHEAD);
    }
  }

  __device__ void run() {
    init();
    ask_tiles();
    for (int n = 0; n < KeyLayout::Ring::AHEAD; ++n) ask(n);
#pragma unroll
    for (int i = 0; i < HEAD / 2; ++i) key_sums[i] = value_sums[i] = 0;
    barrier_wait(memory + KeyLayout::TILES, 0);
    const Strips own = course.needed(seeing), others = course.needed_others(has_tile(plan, pair, group));
    pass(0, own.begin);
    take_all(own);
    pass(own.end, others.begin);
    take_all(others);
    if (!has_tile(plan, pair, group)) return;
    store_tile<Element>(launch, head, pair.image, first, launch.dk, key_sums, launch.scale);
    store_tile<Element>(launch, head, pair.image, first, launch.dv, value_sums, 1);
  }
};

}  // namespace
}  // namespace dalle::cuda
