// The Hopper kernel of dq: a warpgroup owns a tile of 64 queries and takes it through the keys that they see.
//
// It leaves each query's statistics for the kernel of dk and dv, in the order of places.
#pragma once

#include "attention/hopper_backward_block.h"

namespace dalle::cuda {
namespace {

// Shared memory of a block, from its start.
struct QueryLayout {
  using Ring = RingOfStrips<4, false>;
  static constexpr int Q = 0, GRAD_OUT = PAIR * TILE_BYTES, OUT = 2 * GRAD_OUT, RING = 3 * GRAD_OUT;
  static constexpr int TILES = RING + Ring::BYTES, END = TILES + 16;  // the barrier of the tiles
};

template <class Element>
struct QueryGradient {
  const BackwardLaunch& launch;
  const HopperPlan& plan;
  const PairOfTiles pair;
  const HeadNumber head;
  const uint32_t memory;
  const int group, first;
  Strips seen{};
  Course course{};
  QueryLayout::Ring ring;
  uint32_t queries[HEAD / 4], grads[HEAD / 4];
  float shifts[2], deltas[2];
  float sums[HEAD / 2];

  __device__ QueryGradient(const BackwardLaunch& launch_, uint32_t memory_)
      : launch(launch_), plan(launch_.plan), pair(pair_of_queries(plan, blockIdx.x)), head(pair.head, launch_.heads),
        memory(memory_), group(__shfl_sync(~0u, threadIdx.x / 128, 0)), first(pair.first + group * TILE), ring{memory_ + QueryLayout::RING} {
    course.own = keys_seen(plan, pair.image, pair.first);
    seen = {course.own.begin, course.own.begin};
    if (has_tile(plan, pair, group)) seen = keys_seen(plan, pair.image, first);
    if (has_tile(plan, pair, 1)) course.own.end += TILE / STRIP;
    course.others = pair.image ? divided_up(plan.text_len, STRIP) : 0;
  }

  __device__ uint32_t tile(int operand) const { return memory + operand + group * TILE_BYTES; }

  __device__ void init() const {
    if (threadIdx.x == 0) {
      barrier_init(memory + QueryLayout::TILES, 1);
      ring.init();
      barrier_init_done();
    }
    __syncthreads();
  }

  __device__ void ask_tiles() const {
    if (threadIdx.x != 0) return;
    const uint32_t barrier = memory + QueryLayout::TILES;
    barrier_arrive_expecting(barrier, 3 * PAIR * TILE_BYTES);
    for (int i = 0; i < PAIR; ++i) {
      const int place = pair.first + i * TILE, bytes = i * TILE_BYTES;
      copy_tile(memory + QueryLayout::Q + bytes, launch.q, plan, head, pair.image, place, barrier);
      copy_tile(memory + QueryLayout::GRAD_OUT + bytes, launch.grad_out, plan, head, pair.image, place, barrier);
      copy_tile(memory + QueryLayout::OUT + bytes, launch.out, plan, head, pair.image, place, barrier);
    }
  }

  // Asks for strip n, if there is one.
  __device__ void ask(int n) const {
    if (threadIdx.x == 0 && n < course.count()) {
      const bool image = pair.image && course.is_own(n);
      const int place = course.strip(n) * STRIP;
      ring.expect(n);
      copy_strip(ring.strips(n), launch.k, plan, head, image, place, ring.barrier(n));
      copy_strip(ring.strips(n) + STRIP_BYTES, launch.v, plan, head, image, place, ring.barrier(n));
    }
    __syncwarp();
  }

  __device__ void load_statistics() {
    deltas[0] = deltas[1] = 0;
    uint32_t outs[HEAD / 4];
    load_tile(tile(QueryLayout::OUT), outs);
#pragma unroll
    for (int i = 0; i < HEAD / 4; ++i) {
      const float2 out = unpacked(Element{}, outs[i]), grad = unpacked(Element{}, grads[i]);
      deltas[i % 2] += out.x * grad.x + out.y * grad.y;
    }
    const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane / 4;
    const int text = pair.image ? plan.text_tiles * TILE : 0;
    Statistics* statistics = launch.statistics + static_cast<int64_t>(head.all) * plan.tiles * TILE + text;
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const int place = first + row + 8 * which, token = token_of(plan, pair.image, place);
      deltas[which] += __shfl_xor_sync(~0u, deltas[which], 1);
      deltas[which] += __shfl_xor_sync(~0u, deltas[which], 2);
      shifts[which] = INFINITY;
      if (token >= 0) {
        shifts[which] = launch.lse[static_cast<int64_t>(head.all) * launch.seq + token] * LOG2E;
      } else {
        deltas[which] = 0;
      }
      if (lane % 4 == 0 && has_tile(plan, pair, group)) statistics[place] = {shifts[which], deltas[which]};
    }
  }

  // Scores to gradients of the scaled scores, rounded.
  __device__ void differentiate(const float (&weights)[STRIP / 2], const float (&grad_weights)[STRIP / 2],
                                uint32_t (&grad_scores)[STRIP / 4]) const {
#pragma unroll
    for (int i = 0; i < STRIP / 4; ++i) {
      const float delta = deltas[i % 2];
      grad_scores[i] = packed(Element{}, weights[2 * i] * (grad_weights[2 * i] - delta),
                              weights[2 * i + 1] * (grad_weights[2 * i + 1] - delta));
    }
  }

  // Scores to weights; of 8 columns that none of the warp's rows sees there are no exponentials.
  __device__ void weigh(float (&scores)[STRIP / 2], uint32_t mask) const {
    if (__all_sync(~0u, mask == ALL_SEEN)) {
#pragma unroll
      for (int i = 0; i < STRIP / 2; ++i) {
        scores[i] = exp2_approximate(fmaf(scores[i], launch.exponent, -shifts[i / 2 % 2]));
      }
      return;
    }
    const uint32_t any = __reduce_or_sync(~0u, mask | mask >> 8);
#pragma unroll
    for (int columns = 0; columns < STRIP / 8; ++columns) {
      if ((any >> 2 * columns & 3) == 0) {
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[4 * columns + i] = 0;
        continue;
      }
#pragma unroll
      for (int i = 4 * columns; i < 4 * columns + 4; ++i) {
        const int which = i / 2 % 2;
        const float x = fmaf(scores[i], launch.exponent, -shifts[which]);
        scores[i] = exp2_approximate(mask >> (8 * which + 2 * columns + i % 2) & 1 ? x : -INFINITY);
      }
    }
  }

  __device__ void take(int n, bool another, uint32_t mask) {
    const uint64_t keys = tile_descriptor(ring.strips(n)), values = moved(keys, STRIP_BYTES);
    float weights[STRIP / 2], grad_weights[STRIP / 2];
    products_begin();
    multiply_strip<Element>(weights, [&](int depth) { return queries + 4 * depth; }, keys);
#ifdef SSG
    const uint64_t left = tile_descriptor(tile(QueryLayout::GRAD_OUT));
    multiply_strip<Element>(grad_weights, [&](int depth) { return moved(left, 32 * depth); }, values);
#else
    multiply_strip<Element>(grad_weights, [&](int depth) { return grads + 4 * depth; }, values);
#endif
    products_wait_but<1>();  // for the scores, and with them for the last strip's dq
    pin(weights);
    if (another) ring.release(n - 1);
    ask(n + QueryLayout::Ring::AHEAD);
    weigh(weights, mask);
    products_wait();
    pin(grad_weights);
    uint32_t grad_scores[STRIP / 4];
    differentiate(weights, grad_weights, grad_scores);
    products_begin();
#pragma unroll
    for (int key = 0; key < STRIP; key += 16) {
      multiply<Right::rows, HEAD>(Element{}, sums, grad_scores + key / 4, moved(keys, key * TILE_ROW_BYTES), true);
    }
    products_commit();
  }

  __device__ uint32_t mask_of_strip(int n) const {
    const int strip = course.strip(n);
    if (course.is_own(n)) return mask_at(launch, query_mask(plan, pair.image, first, strip));
    return columns_below(plan.text_len - strip * STRIP, threadIdx.x % 4);
  }

  __device__ void take_all(const Strips& strips) {
    for (int n = strips.begin; n < strips.end; ++n) {
      const uint32_t mask = mask_of_strip(n);
      ring.wait(n);
      take(n, n > strips.begin, mask);
    }
    products_wait();
    if (strips.begin < strips.end) ring.release(strips.end - 1);
  }
  __device__ void pass(int begin, int end) const {
    for (int n = begin; n < end; ++n) {
      ring.wait(n);
      ring.release(n);
      ask(n + QueryLayout::Ring::AHEAD);
    }
  }

  __device__ void run() {
    init();
    ask_tiles();
    for (int n = 0; n < QueryLayout::Ring::AHEAD; ++n) ask(n);
    barrier_wait(memory + QueryLayout::TILES, 0);
    load_tile(tile(QueryLayout::Q), queries);
    load_tile(tile(QueryLayout::GRAD_OUT), grads);
    load_statistics();
#pragma unroll
    for (int i = 0; i < HEAD / 2; ++i) sums[i] = 0;
    const Strips own = course.needed(seen), others = course.needed_others(has_tile(plan, pair, group));
    pass(0, own.begin);
    take_all(own);
    pass(own.end, others.begin);
    take_all(others);
    pin(sums);
    if (has_tile(plan, pair, group)) store_tile<Element>(launch, head, pair.image, first, launch.dq, sums, launch.scale);
  }
};

}  // namespace
}  // namespace dalle::cuda
