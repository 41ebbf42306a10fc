// Decoding where no two rows share keys: a block takes one head of one row, its warps every WARPS-th run of keys.
#pragma once

#include "attention/decode_softmax.h"

namespace dalle::cuda {

template <class Element, int HEAD_DIM, int WARPS, int COUNT>
__global__ void __launch_bounds__(WARPS * 32, 16 / WARPS) decode_rows(const __grid_constant__ DecodeLaunch p) {
  using Softmax = RowSoftmax<Element, HEAD_DIM>;
  const int row = blockIdx.x / p.heads, head = blockIdx.x % p.heads;
  const int warp = threadIdx.x / 32, column = threadIdx.x % Softmax::LANES * 8;
  const int group = threadIdx.x % 32 / Softmax::LANES;
  const DecodePattern& pattern = p.pattern;
  const auto text = HeadCache<Element, HEAD_DIM>::text_of(p, row / p.samples, head);
  const auto image = HeadCache<Element, HEAD_DIM>::image_of(p, row, head);
  const int position = place_of(p, true);
  const bool in_image = position >= pattern.text_len;
  const DecodePlace place = decode_place(pattern, in_image ? position - pattern.text_len : 0);
  const int text_keys = in_image ? pattern.text_len : position;
  const int end = pattern.text_len + (in_image ? pattern.numbers - 1 : 0);  // text first, then the image's from 1 on

  Softmax softmax;
  constexpr int ROUND = COUNT * WARPS * Softmax::KEYS;
#pragma unroll 1
  for (int first = 0; first == 0 || first < end; first += ROUND) {
    typename Softmax::template Loaded<COUNT> loaded;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const int number = first + (i * WARPS + warp) * Softmax::KEYS + group;
      if (first + (i + 1) * WARPS * Softmax::KEYS <= text_keys) {  // all threads' keys are text
        loaded.take(i, true, text.keys + number * HEAD_DIM + column, text.values + number * HEAD_DIM + column);
        continue;
      }
      const bool is_text = number < pattern.text_len;
      const VisibleSlot slot = visible_slot(pattern, place, number - pattern.text_len + 1);
      const int at = (is_text ? number : slot.slot) * HEAD_DIM + column;
      const Element* keys = is_text ? text.keys : image.keys;
      const Element* values = is_text ? text.values : image.values;
      loaded.take(i, is_text ? number < text_keys : slot.seen && number < end, keys + at, values + at);
    }
    if (first == 0) {
      await_last_kernel();
      softmax.set_query(load_written(pack_of<Element>(p.q, row, head, column)), p.exponent);
      const FourPairs key = load_written(pack_of<Element>(p.k_new, row, head, column));
      const FourPairs value = load_written(pack_of<Element>(p.v_new, row, head, column));
      const bool begins = warp == 0 && group == 0;
      softmax.begin(key, value, begins, position >= 0);
      if (begins && in_image) image.store(place.own, column, key, value);
      if (begins && !in_image && position >= 0) text.store(position, column, key, value);
    }
    softmax.meet(loaded);
  }

  softmax.join();
  __shared__ float maxima[WARPS], totals[WARPS], sums[WARPS][HEAD_DIM];
  if (group == 0) {
    maxima[warp] = softmax.maximum, totals[warp] = softmax.total;
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[warp][column + i] = softmax.weighted[i];
  }
  __syncthreads();
  if (threadIdx.x >= HEAD_DIM) return;
  float largest = maxima[0], total = 0, sum = 0;
  for (int i = 1; i < WARPS; ++i) largest = fmaxf(largest, maxima[i]);
  for (int i = 0; i < WARPS; ++i) {
    const float share = power(maxima[i] - largest);
    total += totals[i] * share, sum += sums[i][threadIdx.x] * share;
  }
  Element* out = static_cast<Element*>(p.out) + static_cast<int64_t>(blockIdx.x) * HEAD_DIM;
  plain::from_float(sum / total, out[threadIdx.x]);
}

}  // namespace dalle::cuda
