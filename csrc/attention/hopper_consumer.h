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

  // scores = queries times the transpose of KEYS keys at `keys`, of a tile of `rows` rows.
  template <int KEYS>
  __device__ void score(float (&scores)[KEYS / 2], uint32_t keys, int rows) {
    const uint64_t tile = tile_descriptor(keys);
#pragma unroll
    for (int depth = 0; depth < HEAD_DIM / 16; ++depth) {
      const uint64_t right = moved(tile, depth / 4 * rows * TILE_ROW_BYTES + depth % 4 * 32);
      const uint32_t* left = queries + 4 * depth;
      const bool add = depth > 0;
#pragma unroll
      for (int key = 0; key + 64 <= KEYS; key += 64) {
        multiply<Right::columns, 64>(Element{}, scores + key / 2, left, moved(right, key * TILE_ROW_BYTES), add);
      }
      if constexpr (KEYS % 64 >= 32) {
        constexpr int KEY = KEYS / 64 * 64;
        multiply<Right::columns, 32>(Element{}, scores + KEY / 2, left, moved(right, KEY * TILE_ROW_BYTES), add);
      }
      if constexpr (KEYS % 32 >= 16) {
        constexpr int KEY = KEYS / 32 * 32;
        multiply<Right::columns, 16>(Element{}, scores + KEY / 2, left, moved(right, KEY * TILE_ROW_BYTES), add);
      }
    }
  }

  // sums += weights times KEYS values at `values`, of a tile of `rows` rows.
  template <int KEYS>
  __device__ void add_values(const uint32_t (&weights)[KEYS / 4], uint32_t values, int rows) {
    const uint64_t tile = tile_descriptor(values);
#pragma unroll
    for (int key = 0; key < KEYS; key += 16) {
#pragma unroll
      for (int column = 0; column < HEAD_DIM; column += 64) {
        multiply<Right::rows, 64>(Element{}, sums + column / 2, weights + key / 4,
                                  moved(tile, column * 2 * rows + key * TILE_ROW_BYTES), true);
      }
    }
  }

  // Takes the largest scores of the thread's part of both rows. Scaling down is left undone while sums stay small: what
  // divides them at the end is relative to the same maximum.
  __device__ void raise_maxima(float first, float second) {
#pragma unroll
    for (int distance = 1; distance < 4; distance *= 2) {
      first = fmaxf(first, __shfl_xor_sync(~0u, first, distance));
      second = fmaxf(second, __shfl_xor_sync(~0u, second, distance));
    }
    first = fmaxf(maxima[0], first * launch.exponent);
    second = fmaxf(maxima[1], second * launch.exponent);
    if (!__any_sync(~0u, first > maxima[0] + SLACK || second > maxima[1] + SLACK)) return;
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

  template <int KEYS>
  __device__ void weigh_all(const float (&scores)[KEYS / 2], uint32_t (&weights)[KEYS / 4]) {
    float largest[2] = {scores[0], scores[2]};
#pragma unroll
    for (int i = 0; i < KEYS / 2; ++i) largest[i / 2 % 2] = fmaxf(largest[i / 2 % 2], scores[i]);
    raise_maxima(largest[0], largest[1]);
#pragma unroll
    for (int i = 0; i < KEYS / 4; ++i) weights[i] = weigh(scores[2 * i], scores[2 * i + 1], i % 2);
  }

  // The same where bits of `masks`, one for each of a row's scores, tell which count. Of 16 x 16 pieces that no thread
  // of the warp sees there are no exponentials.
  template <int KEYS>
  __device__ void weigh_masked(float (&scores)[KEYS / 2], uint32_t (&weights)[KEYS / 4], const uint32_t (&masks)[2]) {
    const uint32_t seen = __reduce_or_sync(~0u, masks[0] | masks[1]);
    float largest[2] = {LOWEST, LOWEST};
#pragma unroll
    for (int piece = 0; piece < KEYS / 16; ++piece) {
      if ((seen >> 4 * piece & 15) == 0) continue;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int which = i / 2 % 2, bit = 4 * piece + i / 4 * 2 + i % 2;
        float& score = scores[8 * piece + i];
        score = masks[which] >> bit & 1 ? score : -INFINITY;
        largest[which] = fmaxf(largest[which], score);
      }
    }
    raise_maxima(largest[0], largest[1]);
#pragma unroll
    for (int piece = 0; piece < KEYS / 16; ++piece) {
#pragma unroll
      for (int i = 4 * piece; i < 4 * piece + 4; ++i) weights[i] = 0;
      if ((seen >> 4 * piece & 15) == 0) continue;
#pragma unroll
      for (int i = 4 * piece; i < 4 * piece + 4; ++i) weights[i] = weigh(scores[2 * i], scores[2 * i + 1], i % 2);
    }
  }

  // One step: KEYS keys of a tile of ROWS rows at `keys`, their values behind it. The barrier `free`, if there is one,
  // is told when both have been read.
  template <int KEYS, int ROWS, bool MASKED>
  __device__ void take(uint32_t keys, uint32_t free, const uint32_t (&masks)[2]) {
    float scores[KEYS / 2];
    products_begin();
    score<KEYS>(scores, keys, ROWS);
    products_commit();
    products_wait();
    pin(scores);
    uint32_t weights[KEYS / 4];
    if constexpr (MASKED) {
      weigh_masked<KEYS>(scores, weights, masks);
    } else {
      weigh_all<KEYS>(scores, weights);
    }
    products_begin();
    add_values<KEYS>(weights, keys + ROWS * HEAD_DIM * 2, ROWS);
    products_commit();
    products_wait();
    pin(sums);
    if (free != 0) arrive(free);
  }

  // One text tile; the ring stands there. With `last` this warpgroup needs the head's text no more.
  template <int KEYS, bool MASKED>
  __device__ void take_text(const Ring& ring, int number, bool last, const uint32_t (&masks)[2]) {
    const uint32_t barrier = shared.text_barrier(ring.place);
    if (number == arrived) {
      barrier_wait(barrier, ring.parity);
      ++arrived;
    }
    take<KEYS, TILE, MASKED>(shared.text_keys(ring.place), last ? barrier + FREE : 0, masks);
    if (last) {
      ++released;
      advance(release_ring, launch.plan.text_slots);
    }
  }

  __device__ void take_texts(bool image, int number, bool last) {
    const HopperPlan& plan = launch.plan;
    const int whole = image ? plan.text_len / TILE : number, tail = plan.text_len % TILE;
    const uint32_t all[2] = {~0u, ~0u};
    Ring ring = text_ring;
    for (int t = 0; t < whole; ++t, advance(ring, launch.plan.text_slots)) take_text<TILE, false>(ring, t, last, all);
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
        load_masks(mask, masks);
        const uint32_t before = ~mask_below(-(window.start + s * STEP), lane() % 4);
        masks[0] &= before, masks[1] &= before;
        take<STEP, STEP, true>(keys, barrier + FREE, masks);
      } else if constexpr (STEP == TILE) {
        take<STEP, STEP, false>(keys, barrier + FREE, masks);
      }
    }
  }

  __device__ void load_masks(int mask, uint32_t (&masks)[2]) const {
    const uint32_t address = shared.masks() + (mask * 128 + threadIdx.x % 128) * 8;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(masks[0]), "=r"(masks[1]) : "r"(address) : "memory");
  }

  // Four threads have 16 bytes each of four pieces of a row, one piece after the other; afterwards each has one piece.
  __device__ void transpose(uint32_t (&pieces)[4]) const {
    const bool odd = lane() & 1, high = lane() & 2;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const uint32_t got = __shfl_xor_sync(~0u, odd ? pieces[i] : pieces[i + 1], 1);
      pieces[i] = odd ? got : pieces[i], pieces[i + 1] = odd ? pieces[i + 1] : got;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t got = __shfl_xor_sync(~0u, high ? pieces[i] : pieces[i + 2], 2);
      pieces[i] = high ? got : pieces[i], pieces[i + 2] = high ? pieces[i + 2] : got;
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
        transpose(pieces);
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
