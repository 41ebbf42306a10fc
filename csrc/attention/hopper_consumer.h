// A warpgroup of the Hopper kernel: it takes tiles of 64 queries through their keys, text first, so that a maximum is
// finite before the window, of which a query may see nothing in a step.
//
// Weights are relative to the largest score of a row's first keys, as it is: those after it are not searched. Where a
// row's sum shows that this may have been too little, the block takes all its tiles again, with maxima that rise.
#pragma once

#include "attention/hopper_block.h"

namespace dalle::cuda {
namespace {

using namespace plain;

[[maybe_unused]] constexpr float LOWEST = -3.4028234663852886e38f;  // where a running maximum starts: no row needs care
[[maybe_unused]] constexpr float SLACK = 8;  // the power of 2 by which scores may outgrow a maximum that rises
[[maybe_unused]] constexpr float MOST_TOTAL = 1.8446744073709552e19f;  // 2^64: where a maximum has been too little

// What a step does with a row's maximum: takes it as that of its first tile, leaves it, or lets it rise.
enum class Maxima { first, stay, rise };

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
  int number, first;                 // the current tile's number in its head, and its first place among its own part
  bool image, last;                  // whether it is of the image, and the last that reads its head's text
  int head, sample, head_of_sample;  // the current head
  Ring text_ring{};                  // of its first text tile
  int arrived = 0;                   // how many of its text tiles are known to be there
  Ring release_ring{};               // of the first text tile that has not been given back
  int released = 0;                  // how many of the current head's have

  __device__ Consumer(const Launch& launch_, const Shared& shared_)
      : launch(launch_), shared(shared_), share(launch_), group(__shfl_sync(~0u, threadIdx.x / 128, 0)) {}

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
    load_tile(shared.queries(group), queries);
    __syncwarp();
    arrive(barrier + FREE);
    if (launch.sign != 1) {
#pragma unroll
      for (int i = 0; i < HEAD_DIM / 4; ++i) queries[i] = launch.sign == 0 ? 0 : queries[i] ^ 0x80008000u;
    }
  }

  // scores = queries times the transpose of the KEYS keys of the tile at `keys`.
  template <int KEYS>
  __device__ void score(float (&scores)[KEYS / 2], uint32_t keys) {
    const uint64_t tile = tile_descriptor(keys);
#pragma unroll
    for (int depth = 0; depth < HEAD_DIM / 16; ++depth) {
      const uint64_t columns = moved(tile, depth_offset<KEYS>(depth));
      multiply<Right::columns, KEYS>(Element{}, scores, queries + 4 * depth, columns, depth > 0);
    }
  }

  // sums += weights times the KEYS values of the tile at `values`.
  template <int KEYS>
  __device__ void add_values(const uint32_t (&weights)[KEYS / 4], uint32_t values) {
    const uint64_t tile = tile_descriptor(values);
#pragma unroll
    for (int key = 0; key < KEYS; key += 16) {
#pragma unroll
      for (int column = 0; column < HEAD_DIM; column += 64) {
        multiply<Right::rows, 64>(Element{}, sums + column / 2, weights + key / 4,
                                  moved(tile, column * 2 * KEYS + key * TILE_ROW_BYTES), true);
      }
    }
  }

  // Scores that the thread's two rows do not see become minus infinity: bits of `masks`, one for each of a row's, tell
  // which they see. Pieces of 16 x 16 of which `seen` tells that no thread sees them stay as they are.
  template <int KEYS>
  __device__ void mask_scores(float (&scores)[KEYS / 2], const uint32_t (&masks)[2], uint32_t seen) const {
#pragma unroll
    for (int piece = 0; piece < KEYS / 16; ++piece) {
      if ((seen >> 4 * piece & 15) == 0) continue;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int which = i / 2 % 2, bit = 4 * piece + i / 4 * 2 + i % 2;
        float& score = scores[8 * piece + i];
        score = masks[which] >> bit & 1 ? score : -INFINITY;
      }
    }
  }

  // Raises `largest` to the scores, but those of unseen pieces.
  template <int KEYS>
  __device__ void find_largest(const float (&scores)[KEYS / 2], uint32_t seen, float (&largest)[2]) const {
#pragma unroll
    for (int piece = 0; piece < KEYS / 16; ++piece) {
      if ((seen >> 4 * piece & 15) == 0) continue;
#pragma unroll
      for (int i = 0; i < 8; ++i) largest[i / 2 % 2] = fmaxf(largest[i / 2 % 2], scores[8 * piece + i]);
    }
  }

  // Of the thread's part of both rows to those of the rows, of powers of 2.
  __device__ void spread_largest(float (&largest)[2]) const {
    largest[0] *= launch.exponent, largest[1] *= launch.exponent;
#pragma unroll
    for (int distance = 1; distance < 4; distance *= 2) {
      largest[0] = fmaxf(largest[0], __shfl_xor_sync(~0u, largest[0], distance));
      largest[1] = fmaxf(largest[1], __shfl_xor_sync(~0u, largest[1], distance));
    }
  }

  // Takes the largest scores of the thread's part of both rows. Scaling down is left undone while sums stay small: what
  // divides them at the end is relative to the same maximum.
  __device__ void raise_maxima(float (&largest)[2]) {
    const float first = largest[0] * launch.exponent, second = largest[1] * launch.exponent;
    if (!__any_sync(~0u, first > maxima[0] + SLACK || second > maxima[1] + SLACK)) return;
    spread_largest(largest);
    float shrink[2];
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const float before = maxima[which];
      maxima[which] = fmaxf(before, largest[which]);
      shrink[which] = exp2_approximate(before - maxima[which]);
      totals[which] *= shrink[which];
    }
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; ++i) sums[i] *= shrink[i / 2 % 2];
  }

  // Two scores of a row to weights.
  __device__ uint32_t weigh(float a, float b, int which) {
    const float x = exp2_approximate(fmaf(a, launch.exponent, -maxima[which]));
    const float y = exp2_approximate(fmaf(b, launch.exponent, -maxima[which]));
    totals[which] += x + y;
    return rounded_pair(x, y, Element{});
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

  // One step: the KEYS keys of each of TILES tiles, at `keys` with the values behind. The values of a tile are
  // added while the next one's weights are made. The barriers `free`, if there are any, are told when all is read.
  // `meanwhile` is done while scores are made, and returns their masks if there are any.
  template <int KEYS, bool MASKED, Maxima MAXIMA, int TILES = 1, class Meanwhile>
  __device__ __forceinline__ void take(const uint32_t (&keys)[TILES], const uint32_t (&free)[TILES],
                                       const Meanwhile& meanwhile) {
    float scores[TILES][KEYS / 2];
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      products_begin();
      score<KEYS>(scores[i], keys[i]);
      products_commit();
    }
    uint32_t masks[2];
    meanwhile(masks);
    const uint32_t seen = MASKED ? __reduce_or_sync(~0u, masks[0] | masks[1]) : ~0u;
    if (MAXIMA == Maxima::rise) {
      products_wait();
      float largest[2] = {LOWEST, LOWEST};
#pragma unroll
      for (int i = 0; i < TILES; ++i) {
        pin(scores[i]);
        if (MASKED) mask_scores<KEYS>(scores[i], masks, seen);
        find_largest<KEYS>(scores[i], seen, largest);
      }
      raise_maxima(largest);
    }
    uint32_t weights[TILES][KEYS / 4];
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      if (MAXIMA != Maxima::rise) {
        products_wait<TILES - 1>();
        pin(scores[i]);
        if (MASKED) mask_scores<KEYS>(scores[i], masks, seen);
      }
      if (MAXIMA == Maxima::first && i == 0) {
        maxima[0] = maxima[1] = LOWEST;
        find_largest<KEYS>(scores[i], seen, maxima);
        spread_largest(maxima);
      }
      weigh_all<KEYS, MASKED>(scores[i], seen, weights[i]);
      products_begin();
      add_values<KEYS>(weights[i], keys[i] + KEYS * HEAD_DIM * 2);
      products_commit();
    }
    products_wait();
    pin(sums);
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      if (free[i] != 0) arrive(free[i]);
    }
  }

  // What the current tile begins with.
  __device__ void start_sums() {
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; ++i) sums[i] = 0;
    totals[0] = totals[1] = 0;
  }

  // The KEYS keys of each of TILES text tiles from tile `from` on, where the ring stands, which moves on.
  template <int KEYS, bool MASKED, Maxima MAXIMA, int TILES = 1, class Meanwhile>
  __device__ void take_text(Ring& ring, int from, const Meanwhile& meanwhile) {
    uint32_t keys[TILES], free[TILES];
#pragma unroll
    for (int i = 0; i < TILES; ++i, advance(ring, launch.plan.text_slots)) {
      const uint32_t barrier = shared.text_barrier(ring.place);
      if (from + i == arrived) {
        barrier_wait(barrier, ring.parity);
        ++arrived;
      }
      keys[i] = shared.text_keys(ring.place);
      free[i] = last ? barrier + FREE : 0;
    }
    take<KEYS, MASKED, MAXIMA, TILES>(keys, free, meanwhile);
    if (!last) return;
    released += TILES;
    release_ring = ring;
  }

  // The same, as the tile's first step or another one.
  template <int KEYS, bool MASKED, Maxima MAXIMA, int TILES = 1, class Meanwhile>
  __device__ void take_text_or_first(Ring& ring, int from, const Meanwhile& meanwhile) {
    if (MAXIMA == Maxima::rise || from > 0) {
      take_text<KEYS, MASKED, MAXIMA, TILES>(ring, from, meanwhile);
    } else {
      take_text<KEYS, MASKED, Maxima::first, TILES>(ring, from, [&](uint32_t (&masks)[2]) {
        start_sums();
        meanwhile(masks);
      });
    }
  }

  template <Maxima MAXIMA>
  __device__ void take_texts() {
    const int whole = image ? launch.plan.text_len / TILE : number, tail = launch.plan.text_len % TILE;
    const auto all = [](uint32_t (&)[2]) {};
    Ring ring = text_ring;
    int t = 0;
    for (; t + 2 <= whole; t += 2) take_text_or_first<TILE, false, MAXIMA, 2>(ring, t, all);
    if (t < whole) take_text_or_first<TILE, false, MAXIMA>(ring, t, all);
    const auto masks_of_rest = [&](uint32_t (&masks)[2]) {
      masks[0] = mask_below(image ? tail : row() + 1, lane() % 4);
      masks[1] = mask_below(image ? tail : row() + 9, lane() % 4);
    };
    if (whole + 1 == launch.plan.text_tiles && last_text_rows(launch.plan) == FEW) {
      take_text_or_first<FEW, true, MAXIMA>(ring, whole, masks_of_rest);
    } else if (!image || tail > 0) {
      take_text_or_first<TILE, true, MAXIMA>(ring, whole, masks_of_rest);
    }
  }

  template <Maxima MAXIMA>
  __device__ void take_window() {
    const HopperPlan& plan = launch.plan;
    const Window window = window_of(plan, STEP, first);
    for (int s = window.begin; s < window.end; ++s) {
      const uint32_t barrier = shared.window_barrier(group, window_ring.place);
      const uint32_t keys = shared.window_keys(group, window_ring.place);
      barrier_wait(barrier, window_ring.parity);
      advance(window_ring, plan.stages);
      const int mask = mask_of(plan, first, s);
      const auto masks_of_step = [&](uint32_t (&masks)[2]) {
        load_pair(shared.masks() + (mask * 128 + threadIdx.x % 128) * 8, masks);
        const uint32_t before = ~mask_below(-(window.start + s * STEP), lane() % 4);
        masks[0] &= before, masks[1] &= before;
      };
      if constexpr (STEP == TILE) {
        const bool begins = MAXIMA != Maxima::rise && plan.text_tiles == 0 && s == window.begin;
        const auto none = [](uint32_t (&)[2]) {};
        if (mask < 0 && begins) {
          take<STEP, false, Maxima::first>({keys}, {barrier + FREE}, [&](uint32_t (&)[2]) { start_sums(); });
        } else if (mask < 0) {
          take<STEP, false, MAXIMA>({keys}, {barrier + FREE}, none);
        } else if (begins) {
          take<STEP, true, Maxima::first>({keys}, {barrier + FREE}, [&](uint32_t (&masks)[2]) {
            start_sums();
            masks_of_step(masks);
          });
        } else {
          take<STEP, true, MAXIMA>({keys}, {barrier + FREE}, masks_of_step);
        }
      } else {
        take<STEP, true, MAXIMA>({keys}, {barrier + FREE}, masks_of_step);
      }
    }
  }

  // Both rows' results go the way together, for it is a long chain.
  __device__ void store() {
    constexpr float LN2 = 0.69314718055994531f;
    constexpr int BLOCKS = HEAD_DIM / 32;
#pragma unroll
    for (int distance = 1; distance < 4; distance *= 2) {
      totals[0] += __shfl_xor_sync(~0u, totals[0], distance);
      totals[1] += __shfl_xor_sync(~0u, totals[1], distance);
    }
    if (totals[0] > MOST_TOTAL || totals[1] > MOST_TOTAL) shared.again() = 1;
    const float factors[2] = {__fdividef(1, totals[0]), __fdividef(1, totals[1])};
    const int place = first + row();
    const int tokens[2] = {token_of(launch.plan, image, place), token_of(launch.plan, image, place + 8)};
    Element* start = static_cast<Element*>(launch.out.data) + sample * launch.out.batch_stride +
                     head_of_sample * launch.out.head_stride + lane() % 4 * 8;
    float* statistics = launch.lse + static_cast<int64_t>(head) * launch.seq;
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      if (tokens[which] < 0 || lane() % 4 != 0) continue;
      statistics[tokens[which]] = (maxima[which] + __log2f(totals[which])) * LN2;
    }
    uint32_t pieces[2 * BLOCKS][4];
#pragma unroll
    for (int block = 0; block < 2 * BLOCKS; ++block) {
      const int which = block / BLOCKS;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = sums + block % BLOCKS * 16 + 4 * i + 2 * which;
        pieces[block][i] = rounded_pair(pair[0] * factors[which], pair[1] * factors[which], Element{});
      }
    }
    transpose_pieces(pieces);
#pragma unroll
    for (int block = 0; block < 2 * BLOCKS; ++block) {
      const int token = tokens[block / BLOCKS];
      if (token >= 0) store_16_bytes(start + token * launch.out.token_stride + block % BLOCKS * 32, pieces[block]);
    }
  }

  // Takes all tiles, with maxima as the first keys have them or such that rise.
  template <Maxima MAXIMA>
  __device__ void run() {
    const HopperPlan& plan = launch.plan;
    head = share.first_head, sample = head / launch.heads, head_of_sample = head % launch.heads;
    int turn = 0, tile = tile_of_turn(share.first, 0, group, GROUPS);
    number = tile - head * share.tiles;
    if (tile < share.last) load_queries();
    while (tile < share.last) {
      for (; number >= share.tiles; number -= share.tiles) next_head();
      const int next = tile_of_turn(share.first, ++turn, group, GROUPS);
      image = number >= plan.text_tiles, first = (number - (image ? plan.text_tiles : 0)) * TILE;
      last = next >= share.last || number + next - tile >= share.tiles;
      if constexpr (MAXIMA == Maxima::rise) {
        start_sums();
        maxima[0] = maxima[1] = LOWEST;
      }
      if (plan.text_tiles > 0) take_texts<MAXIMA>();
      if (image) take_window<MAXIMA>();
      if (next < share.last) load_queries();
      store();
      number += next - tile, tile = next;
    }
    while (head < share.last_head) next_head();
  }

  // Whether all tiles have to be taken again, by what any of the block's consumers says, once all of them are here.
  __device__ bool is_again() const {
    barrier_arrive(shared.end_barrier());
    barrier_wait(shared.end_barrier(), 0);
    return shared.again() != 0;
  }
};

}  // namespace
}  // namespace dalle::cuda
