// The Hopper kernel of dk and dv: a warpgroup owns a tile of 64 keys and takes it through the queries that see them.
// Scores have a key a row, so that weights and gradients of scores are left operands as they come.
#pragma once

#include "attention/hopper_backward_block.h"

namespace dalle::cuda {
namespace {

template <class Element, int HEAD_DIM>
struct KeyGradients : PairBlock<KeyGradients<Element, HEAD_DIM>, HEAD_DIM, KeyLayout<HEAD_DIM>> {
  using Layout = KeyLayout<HEAD_DIM>;
  using Block = PairBlock<KeyGradients, HEAD_DIM, Layout>;
  using Block::exists, Block::first, Block::head, Block::launch, Block::pair, Block::plan, Block::ring, Block::tile;
  enum : int { K, V };  // its tiles

  float key_sums[HEAD_DIM / 2], value_sums[HEAD_DIM / 2];

  __device__ explicit KeyGradients(const BackwardLaunch& launch_)
      : Block(launch_, pair_of_keys(launch_.plan, blockIdx.x, launch_.all_heads)) {}

  __device__ const Operand& tile_operand(int i) const { return i == K ? launch.k : launch.v; }
  __device__ const Operand& strip_operand(int i) const { return i == 0 ? launch.q : launch.grad_out; }
  __device__ void copy_statistics(int n, bool image, int place) const {
    const int64_t from = static_cast<int64_t>(head.all) * plan.tiles * TILE + (image ? plan.text_tiles * TILE : 0);
    copy_bytes(ring.statistics(n), launch.statistics + from + place, Layout::STATISTICS_BYTES, ring.barrier(n));
  }

  __device__ void run() {
    Course course{queries_seeing(plan, pair.image, pair.first), pair.image ? 0 : tiles_of(plan, true) * (TILE / STRIP)};
    if (has_tile(plan, pair, 1)) course.own.end = queries_seeing(plan, pair.image, pair.first + TILE).end;
    Block::run(course, exists ? queries_seeing(plan, pair.image, first) : Strips{course.own.begin, course.own.begin});
  }

  __device__ void begin() {
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; ++i) key_sums[i] = value_sums[i] = 0;
  }

  // The statistics of a thread's two columns among eight.
  __device__ float4 statistics(int n, int columns) const {
    return load_four(ring.statistics(n) + (columns * 8 + threadIdx.x % 4 * 2) * sizeof(Statistics));
  }

  // Scores to weights; of 8 columns that none of the warp's rows is seen from there are no exponentials.
  __device__ void weigh(int n, float (&scores)[STRIP / 2], uint32_t mask) const {
    if (__all_sync(~0u, mask == ALL_SEEN)) {
#pragma unroll
      for (int columns = 0; columns < STRIP / 8; ++columns) {
        const float4 at = statistics(n, columns);
#pragma unroll
        for (int i = 4 * columns; i < 4 * columns + 4; ++i) {
          scores[i] = exp2_approximate(fmaf(scores[i], launch.exponent, i % 2 ? -at.z : -at.x));
        }
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
      const float4 at = statistics(n, columns);
#pragma unroll
      for (int i = 4 * columns; i < 4 * columns + 4; ++i) {
        const float x = fmaf(scores[i], launch.exponent, i % 2 ? -at.z : -at.x);
        scores[i] = exp2_approximate(mask >> (i / 2 % 2 * 8 + 2 * columns + i % 2) & 1 ? x : -INFINITY);
      }
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
        grad_scores[i / 2] = rounded_pair(weights[i] * (grad_weights[i] - at.y),
                                          weights[i + 1] * (grad_weights[i + 1] - at.w), Element{});
      }
    }
  }

  __device__ void take(const Course& course, int n, uint32_t mask) {
    const uint64_t queries = tile_descriptor(ring.strips(n)), grads = moved(queries, Layout::STRIP_BYTES);
    const uint64_t keys = tile_descriptor(tile(K)), values = tile_descriptor(tile(V));
    float weights[STRIP / 2], grad_weights[STRIP / 2];
    products_begin();
    const auto keys_at = [&](int depth) { return moved(keys, depth_offset<TILE>(depth)); };
    const auto values_at = [&](int depth) { return moved(values, depth_offset<TILE>(depth)); };
    multiply_strip<Element, HEAD_DIM>(weights, keys_at, queries);
    multiply_strip<Element, HEAD_DIM>(grad_weights, values_at, grads);
    products_wait<1>();
    pin(weights);
    Block::ask(course, n + Block::Ring::AHEAD);
    weigh(n, weights, mask);
    uint32_t rounded[STRIP / 4];
#pragma unroll
    for (int i = 0; i < STRIP / 4; ++i) rounded[i] = rounded_pair(weights[2 * i], weights[2 * i + 1], Element{});
    products_wait();
    pin(grad_weights);
    add_strip<Element>(value_sums, rounded, grads);
    uint32_t grad_scores[STRIP / 4];
    differentiate(n, weights, grad_weights, grad_scores);
    add_strip<Element>(key_sums, grad_scores, queries);
    products_wait();
    pin(value_sums);
    pin(key_sums);
    ring.release(n);
  }

  __device__ uint32_t mask_of_strip(const Course& course, int n) const {
    const int mask = course.is_own(n) ? key_mask(plan, pair.image, first, course.strip(n)) : -1;
    return mask_at(launch, mask < 0 ? -1 : query_masks(plan) + mask);
  }

  __device__ void end() const {
    store_tile<Element>(launch, head, pair.image, first, launch.dk, key_sums, launch.scale);
    store_tile<Element>(launch, head, pair.image, first, launch.dv, value_sums, 1);
  }
};

}  // namespace
}  // namespace dalle::cuda
