// A warpgroup of the Hopper kernel: it takes tiles of 64 queries through their keys, text first, so that the running
// maximum is finite before the window, of which a query may see nothing in a step.
#pragma once

#include "attention/hopper_block.h"

namespace dalle::cuda {
namespace {

using namespace plain;

[[maybe_unused]] constexpr float LOWEST = -3.4028234663852886e38f;  // where a running maximum starts: no row needs care
[[maybe_unused]] constexpr float SLACK = 8;  // the power of 2 by which sums may outgrow the maximum they are kept by

template <class Element, int HEAD_DIM, int STEP, int GROUPS>
struct Consumer {
  const Launch& launch;
  const Shared shared;
  const Share share;
  const int group;  // from a shuffle: so the compiler knows that a warp's threads agree on all that follows from it
  uint32_t queries[HEAD_DIM / 4];
  float sums[HEAD_DIM / 2];
  float maxima[2], totals[2];        // of powers of 2; a total is of the thread's own columns until the end
  uint32_t query_parity = 0;
  Ring window_ring{};
  int head, sample, head_of_sample;  // the current head
  Ring text_ring{};                  // of its first text tile
  int arrived = 0;                   // how many of its text tiles are known to be there
  Ring release_ring{};               // of the first text tile that has not been given back
  int released = 0;                  // how many of the current head's have

  __device__ Consumer(const Launch& launch_, const Shared& shared_)
      : launch(launch_), shared(shared_), share(launch_), group(__shfl_sync(~0u, threadIdx.x / 128, 0)),
        head(share.first_head), sample(head / launch_.heads), head_of_sample(head % launch_.heads) {}

  __device__ int lane() const { return threadIdx.x % 32; }
  // The first of the thread's two rows of a tile; the other one is 8 further.
  __device__ int row() const { return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4; }

  __device__ void arrive(uint32_t barrier) {
    if (lane() == 0) barrier_arrive(barrier);
  }

  // Gives back the current head's text up to tile `count`, read or not.
  __device__ void release_text(int count) {
    for (; released < count; ++released) {
      const uint32_t barrier = shared.text_barrier(release_ring.place);
      barrier_wait(barrier, release_ring.parity);
      arrive(barrier + FREE);
      advance(release_ring, launch.plan.text_slots);
    }
  }
  __device__ void next_head() {
    release_text(launch.plan.text_tiles);
    released = arrived = 0;
    text_ring = release_ring;
    ++head;
    if (++head_of_sample == launch.heads) head_of_sample = 0, ++sample;
  }

  __device__ void load_queries() {
    const uint32_t barrier = shared.query_barrier(group);
    barrier_wait(barrier, query_parity);
    query_parity ^= 1;
    const uint32_t rows = threadIdx.x % 128 / 32 * 16 + lane() % 16;
#pragma unroll
    for (int depth = 0; depth < HEAD_DIM / 16; ++depth) {
      const uint32_t tile = shared.queries(group) + depth / 4 * TILE * TILE_ROW_BYTES;
      load_blocks(tile + swizzled_offset(rows, depth % 4 * 2 + lane() / 16), queries + 4 * depth);
    }
    __syncwarp();
    arrive(barrier + FREE);
    if (launch.sign != 1) {
#pragma unroll
      for (int i = 0; i < HEAD_DIM / 4; ++i) queries[i] = launch.sign == 0 ? 0 : queries[i] ^ 0x80008000u;
    }
  }

  // scores = queries times the transpose of KEYS keys at `keys`, of a tile of ROWS rows.
  template <int KEYS, int ROWS>
  __device__ void score(float (&scores)[KEYS / 2], uint32_t keys) {
    const uint64_t tile = tile_descriptor(keys);
#pragma unroll
    for (int depth = 0; depth < HEAD_DIM / 16; ++depth) {
      const uint32_t offset = depth / 4 * ROWS * TILE_ROW_BYTES + depth % 4 * 32;
      multiply<Right::columns, KEYS>(Element{}, scores, queries + 4 * depth, moved(tile, offset), depth > 0);
    }
  }

  // sums += weights times KEYS values at `values`, of a tile of ROWS rows.
  template <int KEYS, int ROWS>
  __device__ void add_values(const uint32_t (&weights)[KEYS / 4], uint32_t values) {
    const uint64_t tile = tile_descriptor(values);
#pragma unroll
    for (int key = 0; key < KEYS; key += 16) {
#pragma unroll
      for (int column = 0; column < HEAD_DIM; column += 64) {
        multiply<Right::rows, 64>(Element{}, sums + column / 2, weights + key / 4,
                                  moved(tile, column * 2 * ROWS + key * TILE_ROW_BYTES), true);
      }
    }
  }

  // Raises `largest` to the scores that the thread's two rows see: all, or those that bits of `masks`, one for each of
  // a row's, tell. Others become minus infinity, but in 16 x 16 pieces of which `seen` tells that no thread sees them.
  template <int KEYS, bool MASKED>
  __device__ void find_largest(float (&scores)[KEYS / 2], const uint32_t (&masks)[2], uint32_t seen,
                               float (&largest)[2]) const {
#pragma unroll
    for (int piece = 0; piece < KEYS / 16; ++piece) {
      if (MASKED && (seen >> 4 * piece & 15) == 0) continue;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int which = i / 2 % 2, bit = 4 * piece + i / 4 * 2 + i % 2;
        float& score = scores[8 * piece + i];
        if (MASKED) score = masks[which] >> bit & 1 ? score : -INFINITY;
        largest[which] = fmaxf(largest[which], score);
      }
    }
  }

  // Takes the largest scores of the thread's part of both rows. Scaling down is left undone while sums stay small: what
  // divides them at the end is relative to the same maximum.
  __device__ void raise_maxima(const float (&largest)[2]) {
    float first = largest[0] * launch.exponent, second = largest[1] * launch.exponent;
    if (!__any_sync(~0u, first > maxima[0] + SLACK || second > maxima[1] + SLACK)) return;
#pragma unroll
    for (int distance = 1; distance < 4; distance *= 2) {
      first = fmaxf(first, __shfl_xor_sync(~0u, first, distance));
      second = fmaxf(second, __shfl_xor_sync(~0u, second, distance));
    }
    first = fmaxf(maxima[0], first), second = fmaxf(maxima[1], second);
    const float shrink[2] = {exp2_approximate(maxima[0] - first), exp2_approximate(maxima[1] - second)};
    maxima[0] = first, maxima[1] = second;
    totals[0] *= shrink[0], totals[1] *= shrink[1];
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; ++i) sums[i] *= shrink[i / 2 % 2];
  }

  // Two scores of a row to weights.
  __device__ uint32_t weigh(float a, float b, int which) {
    const float x = exp2_approximate(fmaf(a, launch.exponent, -maxima[which]));
    const float y = exp2_approximate(fmaf(b, launch.exponent, -maxima[which]));
    totals[which] += x + y;
    return packed(Element{}, x, y);
  }

  template <int KEYS, bool MASKED>
  __device__ void weigh_all(const float (&scores)[KEYS / 2], uint32_t seen, uint32_t (&weights)[KEYS / 4]) {
#pragma unroll
    for (int piece = 0; piece < KEYS / 16; ++piece) {
#pragma unroll
      for (int i = 4 * piece; i < 4 * piece + 4; ++i) weights[i] = 0;
      if (MASKED && (seen >> 4 * piece & 15) == 0) continue;
#pragma unroll
      for (int i = 4 * piece; i < 4 * piece + 4; ++i) weights[i] = weigh(scores[2 * i], scores[2 * i + 1], i % 2);
    }
  }

  // One step: KEYS keys of each of TILES tiles of ROWS rows, at `keys` with the values behind. The values of a tile are
  // added while the next one's weights are made. The barriers `free`, if there are any, are told when all is read.
  template <int KEYS, int ROWS, bool MASKED, int TILES = 1>
  __device__ void take(const uint32_t (&keys)[TILES], const uint32_t (&free)[TILES], const uint32_t (&masks)[2]) {
    float scores[TILES][KEYS / 2];
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      products_begin();
      score<KEYS, ROWS>(scores[i], keys[i]);
      products_commit();
    }
    const uint32_t seen = MASKED ? __reduce_or_sync(~0u, masks[0] | masks[1]) : ~0u;
    float largest[2] = {LOWEST, LOWEST};
    products_wait<TILES - 1>();
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      if (i > 0) products_wait();
      pin(scores[i]);
      find_largest<KEYS, MASKED>(scores[i], masks, seen, largest);
    }
    raise_maxima(largest);
    uint32_t weights[TILES][KEYS / 4];
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      weigh_all<KEYS, MASKED>(scores[i], seen, weights[i]);
      products_begin();
      add_values<KEYS, ROWS>(weights[i], keys[i] + ROWS * HEAD_DIM * 2);
      products_commit();
    }
    products_wait();
    pin(sums);
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      if (free[i] != 0) arrive(free[i]);
    }
  }

  // KEYS keys of each of TILES text tiles from number `number` on, where the ring stands, which moves on. With `last`
  // this warpgroup needs the head's text no more.
  template <int KEYS, bool MASKED, int TILES = 1>
  __device__ void take_text(Ring& ring, int number, bool last, const uint32_t (&masks)[2]) {
    uint32_t keys[TILES], free[TILES];
#pragma unroll
    for (int i = 0; i < TILES; ++i, advance(ring, launch.plan.text_slots)) {
      const uint32_t barrier = shared.text_barrier(ring.place);
      if (number + i == arrived) {
        barrier_wait(barrier, ring.parity);
        ++arrived;
      }
      keys[i] = shared.text_keys(ring.place);
      free[i] = last ? barrier + FREE : 0;
    }
    take<KEYS, TILE, MASKED, TILES>(keys, free, masks);
    if (!last) return;
    released += TILES;
    release_ring = ring;
  }

  __device__ void take_texts(bool image, int number, bool last) {
    const HopperPlan& plan = launch.plan;
    const int whole = image ? plan.text_len / TILE : number, tail = plan.text_len % TILE;
    const uint32_t all[2] = {~0u, ~0u};
    Ring ring = text_ring;
    int t = 0;
    for (; t + 2 <= whole; t += 2) take_text<TILE, false, 2>(ring, t, last, all);
    if (t < whole) take_text<TILE, false>(ring, t, last, all);
    if (image && tail > 0 && tail <= 16) {
      const uint32_t below = mask_below(tail, lane() % 4);
      take_text<16, true>(ring, whole, last, {below, below});
    } else if (!image || tail > 0) {
      const int first = image ? tail : row() + 1, second = image ? tail : row() + 9;
      take_text<TILE, true>(ring, whole, last, {mask_below(first, lane() % 4), mask_below(second, lane() % 4)});
    }
  }

  __device__ void take_window(int first) {
    const HopperPlan& plan = launch.plan;
    const Window window = window_of(plan, STEP, first);
    for (int s = window.begin; s < window.end; ++s) {
      const uint32_t barrier = shared.window_barrier(group, window_ring.place);
      const uint32_t keys = shared.window_keys(group, window_ring.place);
      barrier_wait(barrier, window_ring.parity);
      advance(window_ring, launch.plan.stages);
      const int mask = mask_of(plan, first, s);
      uint32_t masks[2] = {~0u, ~0u};
      if (mask >= 0) {
        load_pair(shared.masks() + (mask * 128 + threadIdx.x % 128) * 8, masks);
        const uint32_t before = ~mask_below(-(window.start + s * STEP), lane() % 4);
        masks[0] &= before, masks[1] &= before;
        take<STEP, STEP, true>({keys}, {barrier + FREE}, masks);
      } else if constexpr (STEP == TILE) {
        take<STEP, STEP, false>({keys}, {barrier + FREE}, masks);
      }
    }
  }

  __device__ void store(bool image, int place) {
    constexpr float LN2 = 0.69314718055994531f;
    Element* start = static_cast<Element*>(launch.out.data) + sample * launch.out.batch_stride +
                     head_of_sample * launch.out.head_stride + lane() % 4 * 8;
    float* statistics = launch.lse + static_cast<int64_t>(head) * launch.seq;
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      float total = totals[which];
      total += __shfl_xor_sync(~0u, total, 1);
      total += __shfl_xor_sync(~0u, total, 2);
      const float factor = __fdividef(1, total);
      const int token = token_of(launch.plan, image, place + row() + 8 * which);
      Element* out = start + token * launch.out.token_stride;
#pragma unroll
      for (int column = 0; column < HEAD_DIM; column += 32) {
        uint32_t pieces[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* pair = sums + column / 2 + 4 * i + 2 * which;
          pieces[i] = packed(Element{}, pair[0] * factor, pair[1] * factor);
        }
        transpose_pieces(pieces);
        if (token >= 0) store_16_bytes(out + column, pieces);
      }
      if (token >= 0 && lane() % 4 == 0) statistics[token] = (maxima[which] + __log2f(total)) * LN2;
    }
  }

  __device__ void run() {
    const HopperPlan& plan = launch.plan;
    int turn = 0, tile = tile_of_turn(share.first, 0, group, GROUPS), number = tile - head * share.tiles;
    while (tile < share.last) {
      for (; number >= share.tiles; number -= share.tiles) next_head();
      const int first = (number - plan.text_tiles) * TILE, next = tile_of_turn(share.first, ++turn, group, GROUPS);
      const bool image = first >= 0, last = next >= share.last || number + next - tile >= share.tiles;
      load_queries();
#pragma unroll
      for (int i = 0; i < HEAD_DIM / 2; ++i) sums[i] = 0;
      maxima[0] = maxima[1] = LOWEST, totals[0] = totals[1] = 0;
      take_texts(image, number, last);
      if (image) take_window(first);
      store(image, image ? first : number * TILE);
      number += next - tile, tile = next;
    }
    while (head < share.last_head) next_head();
  }
};

}  // namespace
}  // namespace dalle::cuda
