// The Hopper kernel of dq: a warpgroup owns a tile of 64 queries and takes it through the keys that they see.
//
// It leaves each query's statistics for the kernel of dk and dv, in the order of places.
#pragma once

#include "attention/hopper_backward_block.h"

namespace dalle::cuda {
namespace {

template <class Element, int HEAD_DIM>
struct QueryGradient : PairBlock<QueryGradient<Element, HEAD_DIM>, HEAD_DIM, QueryLayout<HEAD_DIM>> {
  using Layout = QueryLayout<HEAD_DIM>;
  using Block = PairBlock<QueryGradient, HEAD_DIM, Layout>;
  using Block::exists, Block::first, Block::head, Block::launch, Block::pair, Block::plan, Block::ring, Block::tile;
  enum : int { Q, GRAD_OUT, OUT };  // its tiles

  uint32_t queries[HEAD_DIM / 4], grads[HEAD_DIM / 4];
  float shifts[2], deltas[2];
  float sums[HEAD_DIM / 2];

  __device__ explicit QueryGradient(const BackwardLaunch& launch_)
      : Block(launch_, pair_of_queries(launch_.plan, blockIdx.x)) {}

  __device__ const Operand& tile_operand(int i) const {
    return i == Q ? launch.q : i == GRAD_OUT ? launch.grad_out : launch.out;
  }
  __device__ const Operand& strip_operand(int i) const { return i == 0 ? launch.k : launch.v; }
  __device__ void copy_statistics(int, bool, int) const {}

  __device__ void run() {
    load_shifts();
    Course course{keys_seen(plan, pair.image, pair.first), pair.image ? divided_up(plan.text_len, STRIP) : 0};
    if (has_tile(plan, pair, 1)) course.own.end = keys_seen(plan, pair.image, pair.first + TILE).end;
    Block::run(course, exists ? keys_seen(plan, pair.image, first) : Strips{course.own.begin, course.own.begin});
  }

  __device__ void begin() {
    load_tile(tile(Q), queries);
    load_tile(tile(GRAD_OUT), grads);
    find_deltas();
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; ++i) sums[i] = 0;
  }

  __device__ int row() const { return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4; }

  // Asked for before anything else: it comes while the tiles do.
  __device__ void load_shifts() {
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const int token = exists ? token_of(plan, pair.image, first + row() + 8 * which) : -1;
      shifts[which] = INFINITY;
      if (token >= 0) shifts[which] = __ldg(launch.lse + static_cast<int64_t>(head.all) * launch.seq + token) * LOG2E;
    }
  }

  __device__ void find_deltas() {
    deltas[0] = deltas[1] = 0;
    uint32_t outs[HEAD_DIM / 4];
    load_tile(tile(OUT), outs);
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 4; ++i) {
      const float2 out = numbers_of(outs[i], Element{}), grad = numbers_of(grads[i], Element{});
      deltas[i % 2] += out.x * grad.x + out.y * grad.y;
    }
    const int place = (pair.image ? plan.text_tiles * TILE : 0) + first + row();
    Statistics* statistics = launch.statistics + static_cast<int64_t>(head.all) * plan.tiles * TILE + place;
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      deltas[which] += __shfl_xor_sync(~0u, deltas[which], 1);
      deltas[which] += __shfl_xor_sync(~0u, deltas[which], 2);
      if (shifts[which] == INFINITY) deltas[which] = 0;  // there is no such query, and what lies there is another's
      if (threadIdx.x % 4 == 0 && exists) statistics[8 * which] = {shifts[which], deltas[which]};
    }
  }

  // Scores to gradients of the scaled scores, rounded.
  __device__ void differentiate(const float (&weights)[STRIP / 2], const float (&grad_weights)[STRIP / 2],
                                uint32_t (&grad_scores)[STRIP / 4]) const {
#pragma unroll
    for (int i = 0; i < STRIP / 4; ++i) {
      const float delta = deltas[i % 2];
      grad_scores[i] = rounded_pair(weights[2 * i] * (grad_weights[2 * i] - delta),
                                    weights[2 * i + 1] * (grad_weights[2 * i + 1] - delta), Element{});
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

  __device__ void take(const Course& course, int n, uint32_t mask) {
    const uint64_t keys = tile_descriptor(ring.strips(n)), values = moved(keys, Layout::STRIP_BYTES);
    float weights[STRIP / 2], grad_weights[STRIP / 2];
    products_begin();
    multiply_strip<Element, HEAD_DIM>(weights, [&](int depth) { return queries + 4 * depth; }, keys);
    multiply_strip<Element, HEAD_DIM>(grad_weights, [&](int depth) { return grads + 4 * depth; }, values);
    products_wait<1>();
    pin(weights);
    Block::ask(course, n + Block::Ring::AHEAD);
    weigh(weights, mask);
    products_wait();
    pin(grad_weights);
    uint32_t grad_scores[STRIP / 4];
    differentiate(weights, grad_weights, grad_scores);
    add_strip<Element>(sums, grad_scores, keys);
    products_wait();
    pin(sums);
    ring.release(n);
  }

  __device__ uint32_t mask_of_strip(const Course& course, int n) const {
    const int strip = course.strip(n);
    if (course.is_own(n)) return mask_at(launch, query_mask(plan, pair.image, first, strip));
    return columns_below(plan.text_len - strip * STRIP, threadIdx.x % 4);
  }

  __device__ void end() const {
    store_tile<Element>(launch, head, pair.image, first, launch.dq, sums, launch.scale);
  }
};

}  // namespace
}  // namespace dalle::cuda
