// How the blocks of an elementwise CUDA kernel share arrays: by tiles of some thousand elements, in which every thread
// has several packs in flight before it uses the first. Neighbouring threads take neighbouring packs.
#pragma once

#include "common/pack.h"

namespace dalle::cuda {

constexpr int TILE_THREADS = 256;

// Tiles of arrays with elements of these types; each thread loads PACKS packs.
template <int PACKS_, class... T>
struct Tiles {
  static constexpr int PACKS = PACKS_, COUNT = pack_size<T...>(), ELEMENTS = TILE_THREADS * PACKS * COUNT;

  // How many tiles cover `count` elements.
  static int64_t covering(int64_t count) { return (count + ELEMENTS - 1) / ELEMENTS; }
};

// Writes job.apply(input) to `output`, of which tile number `tile` is this block's share.
template <class Shape, class Job, class Input, class Output>
__device__ __forceinline__ void map_tile(Job& job, int64_t tile, int64_t count, const Input* __restrict__ input,
                                         Output* __restrict__ output) {
  constexpr int COUNT = Shape::COUNT, PACKS = Shape::PACKS;
  const int64_t first = tile * Shape::ELEMENTS, left = count - first;
  const int here = left < Shape::ELEMENTS ? static_cast<int>(left) : Shape::ELEMENTS;
  const int packs = are_aligned(input, output) ? here / COUNT : 0, thread = threadIdx.x;
  input += first;
  output += first;
  Pack<Input, COUNT> in[PACKS];
#pragma unroll
  for (int p = 0; p < PACKS; ++p) {
    if (p * TILE_THREADS + thread < packs) in[p] = load_pack<COUNT>(input, p * TILE_THREADS + thread);
  }
#pragma unroll
  for (int p = 0; p < PACKS; ++p) {
    if (p * TILE_THREADS + thread < packs) {
      store_pack(output, p * TILE_THREADS + thread, job.template apply<Output>(in[p]));
    }
  }
  // What fills no pack, or all of arrays that are not aligned.
  for (int i = packs * COUNT + thread; i < here; i += TILE_THREADS) {
    store_pack(output, i, job.template apply<Output>(load_pack<1>(input, i)));
  }
}

}  // namespace dalle::cuda
