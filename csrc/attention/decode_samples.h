// Decoding where samples share a prompt's text: a block takes one head of up to 16 samples of a prompt.
//
// Each of its 16 warps has a sample, whose image keys nobody else reads, and every 16th tile of 16 text keys, which it
// multiplies with the queries of all 16 samples. What threads will need of the text they ask for first, each for
// itself, into shared memory, where it takes no registers; then for the image keys. All of a text of up to 512 tokens,
// of heads of 64, or 256, of heads of 128, is on its way at once.
#pragma once

#include "attention/decode_softmax.h"

namespace dalle::cuda {

constexpr int SAMPLES_OF_BLOCK = 16;

template <class Element, int HEAD_DIM>
struct TextTiles {
  static constexpr int KEYS = 16, WARPS = 16, THREADS = WARPS * 32, SLOTS = HEAD_DIM == 64 ? 2 : 1;
  static constexpr int CHUNKS = HEAD_DIM / 32, HALVES = HEAD_DIM / 64;  // of a row of keys, and of values
  static constexpr int PACKS = 2 * CHUNKS + 4 * HALVES;                 // of a tile, a thread
  static constexpr int SUMS = HEAD_DIM + 4;                             // a row of partial sums, padded
  static constexpr int BYTES = SLOTS * PACKS * THREADS * static_cast<int>(sizeof(FourPairs));
  // Heads of 128 leave no registers for the queries beside the sums: they wait in shared memory behind the tiles.
  static constexpr bool QUERIES_WAIT = HEAD_DIM != 64;
  static constexpr int QUERIES_BYTES = QUERIES_WAIT ? 2 * CHUNKS * 32 * static_cast<int>(sizeof(FourPairs)) : 0;
  static constexpr int SUMS_BYTES = WARPS * SAMPLES_OF_BLOCK * SUMS * static_cast<int>(sizeof(float));

  HeadCache<Element, HEAD_DIM> text;
  int text_len, warp, row, lane;  // rows and lanes as common/mma.h has them
  FourPairs* memory;
  float maximum[2], total[2], sums[8 * HALVES][4];  // of samples `row` and `row` + 8

  __device__ TextTiles(const HeadCache<Element, HEAD_DIM>& text_, int text_len_, uint8_t* shared)
      : text(text_), text_len(text_len_), warp(threadIdx.x / 32), row(threadIdx.x % 32 / 4), lane(threadIdx.x % 4),
        memory(reinterpret_cast<FourPairs*>(shared) + threadIdx.x) {}

  __device__ __forceinline__ FourPairs& place(int turn, int pack) const {
    return memory[(turn % SLOTS * PACKS + pack) * THREADS];
  }
  __device__ __forceinline__ int first_key(int turn) const { return (turn * WARPS + warp) * KEYS; }
  __device__ __forceinline__ int64_t offset(int key, int column) const {
    return static_cast<int64_t>(key < text_len ? key : text_len - 1) * HEAD_DIM + column;
  }

  // Asks for the tile of a turn, if there is one: keys `row` and `row` + 8 of it, values 2 * lane and the next, and
  // those 8 further, at columns 8 * row on.
  __device__ __forceinline__ void ask(int turn) const {
    const int first = first_key(turn);
    if (first < text_len) {
#pragma unroll
      for (int i = 0; i < 2 * CHUNKS; ++i) {
        copy_pack(&place(turn, i), text.keys + offset(first + i % 2 * 8 + row, i / 2 * 32 + lane * 8));
      }
#pragma unroll
      for (int i = 0; i < 4 * HALVES; ++i) {
        const int key = first + 2 * lane + i % 2 + i / 2 % 2 * 8;
        copy_pack(&place(turn, 2 * CHUNKS + i), text.values + offset(key, i / 4 * 64 + row * 8));
      }
    }
    copies_commit();
  }

  __device__ __forceinline__ void begin() {
#pragma unroll
    for (int half = 0; half < 2; ++half) maximum[half] = LOWEST, total[half] = 0;
#pragma unroll
    for (int i = 0; i < 8 * HALVES; ++i) sums[i][0] = sums[i][1] = sums[i][2] = sums[i][3] = 0;
  }

  // Takes the tile of a turn into the softmaxes; query(i) is chunk i / 2 of row `row`, or, of an odd i, of `row` + 8.
  template <class Query>
  __device__ __forceinline__ void meet(int turn, const Query& query, float exponent) {
    float scores[2][4] = {};
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      const FourPairs upper = query(2 * chunk), lower = query(2 * chunk + 1);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const FourPairs key = place(turn, 2 * chunk + i);
#pragma unroll
        for (int j = 0; j < 4; j += 2) {
          multiply_add<Element>(scores[i], upper.pairs[j], lower.pairs[j], upper.pairs[j + 1], lower.pairs[j + 1],
                                key.pairs[j], key.pairs[j + 1]);
        }
      }
    }
    const int first = first_key(turn) + 2 * lane;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float largest = maximum[half];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& score = scores[i / 2][half * 2 + i % 2];
        score = first + i / 2 * 8 + i % 2 < text_len ? score * exponent : -INFINITY;
        largest = fmaxf(largest, score);
      }
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
      const float shrink = power(maximum[half] - largest);
      maximum[half] = largest, total[half] *= shrink;
#pragma unroll
      for (int i = 0; i < 8 * HALVES; ++i) sums[i][half * 2] *= shrink, sums[i][half * 2 + 1] *= shrink;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& score = scores[i / 2][half * 2 + i % 2];
        score = power(score - largest), total[half] += score;
      }
    }
    uint32_t weights[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      weights[i] = rounded_pair(scores[i / 2][i % 2 * 2], scores[i / 2][i % 2 * 2 + 1], Element{});
    }
#pragma unroll
    for (int half = 0; half < HALVES; ++half) {
      const int at = 2 * CHUNKS + 4 * half;
      const FourPairs packs[4] = {place(turn, at), place(turn, at + 1), place(turn, at + 2), place(turn, at + 3)};
#pragma unroll
      for (int i = 0; i < 8; i += 2) {
        const uint32_t a = packs[0].pairs[i / 2], b = packs[1].pairs[i / 2];
        const uint32_t c = packs[2].pairs[i / 2], d = packs[3].pairs[i / 2];
        multiply_add<Element>(sums[half * 8 + i], weights[0], weights[1], weights[2], weights[3], pair_of<0>(a, b),
                              pair_of<0>(c, d));
        multiply_add<Element>(sums[half * 8 + i + 1], weights[0], weights[1], weights[2], weights[3], pair_of<1>(a, b),
                              pair_of<1>(c, d));
      }
    }
  }

  // Column 8 * c + i of a half is column c of its product i; the thread has columns c = 2 * lane and the next.
  __device__ __forceinline__ void store(float* maxima, float* totals, float* partial) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      total[half] += __shfl_xor_sync(~0u, total[half], 1);
      total[half] += __shfl_xor_sync(~0u, total[half], 2);
      const int sample = warp * SAMPLES_OF_BLOCK + row + half * 8;
      if (lane == 0) maxima[sample] = maximum[half], totals[sample] = total[half];
#pragma unroll
      for (int i = 0; i < 8 * HALVES; ++i) {
        const int column = i / 8 * 64 + lane * 16 + i % 8;
        float* const place = partial + sample * SUMS + column;
        place[0] = sums[i][half * 2], place[8] = sums[i][half * 2 + 1];
      }
    }
  }
};

template <int HEAD_DIM>
struct SamplesShared {
  float window_maxima[SAMPLES_OF_BLOCK], window_totals[SAMPLES_OF_BLOCK], window[SAMPLES_OF_BLOCK][HEAD_DIM];
  float maxima[16 * SAMPLES_OF_BLOCK], totals[16 * SAMPLES_OF_BLOCK];
};

template <class Element, int HEAD_DIM, int COUNT>
__global__ void __launch_bounds__(512, 1) decode_samples(const __grid_constant__ DecodeLaunch p) {
  using Text = TextTiles<Element, HEAD_DIM>;
  using Softmax = RowSoftmax<Element, HEAD_DIM>;
  uint8_t* const memory = launched_shared();
  const int prompt = blockIdx.x / p.heads, head = blockIdx.x % p.heads, first_sample = blockIdx.y * SAMPLES_OF_BLOCK;
  const int warp = threadIdx.x / 32, column = threadIdx.x % Softmax::LANES * 8;
  const int group = threadIdx.x % 32 / Softmax::LANES;
  const int sample = first_sample + warp, first_row = prompt * p.samples;
  const bool is_sample = sample < p.samples;
  const int row = first_row + (is_sample ? sample : 0);
  const DecodePattern& pattern = p.pattern;
  const auto image = HeadCache<Element, HEAD_DIM>::image_of(p, row, head);

  Text text(HeadCache<Element, HEAD_DIM>::text_of(p, prompt, head), pattern.text_len, memory);
#pragma unroll
  for (int turn = 0; turn < Text::SLOTS; ++turn) text.ask(turn);
  const int position = place_of(p, false);
  const DecodePlace place = decode_place(pattern, position < 0 ? 0 : position - pattern.text_len);
  const int numbers = position < 0 || !is_sample ? 0 : pattern.numbers;
  Softmax softmax;
#pragma unroll 1
  for (int first = 0; first == 0 || first + 1 < numbers; first += COUNT * Softmax::KEYS) {
    typename Softmax::template Loaded<COUNT> loaded;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const int number = 1 + first + i * Softmax::KEYS + group;
      const VisibleSlot slot = visible_slot(pattern, place, number);
      const int at = slot.slot * HEAD_DIM + column;
      loaded.take(i, slot.seen && number < numbers, image.keys + at, image.values + at);
    }
    if (first == 0) {
      await_last_kernel();
      softmax.set_query(load_written(pack_of<Element>(p.q, row, head, column)), p.exponent);
      const FourPairs key = load_written(pack_of<Element>(p.k_new, row, head, column));
      const FourPairs value = load_written(pack_of<Element>(p.v_new, row, head, column));
      softmax.begin(key, value, group == 0, position >= 0);
      if (group == 0 && is_sample && position >= 0) image.store(place.own, column, key, value);
    }
    softmax.meet(loaded);
  }
  softmax.join();
  __shared__ SamplesShared<HEAD_DIM> shared;
  if (group == 0) {
    shared.window_maxima[warp] = softmax.maximum, shared.window_totals[warp] = softmax.total;
#pragma unroll
    for (int i = 0; i < 8; ++i) shared.window[warp][column + i] = softmax.weighted[i];
  }

  const auto load_query = [&](int i) {
    const int other = first_sample + text.row + i % 2 * 8, at = i / 2 * 32 + text.lane * 8;
    return other < p.samples ? load_written(pack_of<Element>(p.q, first_row + other, head, at)) : FourPairs{};
  };
  FourPairs queries[Text::QUERIES_WAIT ? 1 : 2 * Text::CHUNKS];
  FourPairs* const waiting = reinterpret_cast<FourPairs*>(memory + Text::BYTES) + threadIdx.x % 32;
  if constexpr (Text::QUERIES_WAIT) {
    if (warp < 2 * Text::CHUNKS) waiting[warp * 32] = load_query(warp);
    __syncthreads();
  } else {
#pragma unroll
    for (int i = 0; i < 2 * Text::CHUNKS; ++i) queries[i] = load_query(i);
  }
  const auto query = [&](int i) {
    if constexpr (Text::QUERIES_WAIT) {
      return waiting[i * 32];
    } else {
      return queries[i];
    }
  };
  text.begin();
#pragma unroll 1
  for (int turn = 0; text.first_key(turn) < pattern.text_len; ++turn) {
    copies_wait<Text::SLOTS - 1>();
    text.meet(turn, query, p.exponent);
    text.ask(turn + Text::SLOTS);
  }
  copies_wait<0>();
  __syncthreads();  // the tiles' memory takes the sums
  float* const partial = reinterpret_cast<float*>(memory);
  text.store(shared.maxima, shared.totals, partial);
  __syncthreads();

  if (!is_sample) return;
  float largest = shared.window_maxima[warp];
  for (int i = 0; i < Text::WARPS; ++i) largest = fmaxf(largest, shared.maxima[i * SAMPLES_OF_BLOCK + warp]);
  const float share = power(shared.window_maxima[warp] - largest);
  float total = shared.window_totals[warp] * share, sums[HEAD_DIM / 32];
#pragma unroll
  for (int j = 0; j < HEAD_DIM / 32; ++j) sums[j] = shared.window[warp][threadIdx.x % 32 + 32 * j] * share;
  for (int i = 0; i < Text::WARPS; ++i) {
    const int part = i * SAMPLES_OF_BLOCK + warp;
    const float share = power(shared.maxima[part] - largest);
    total += shared.totals[part] * share;
#pragma unroll
    for (int j = 0; j < HEAD_DIM / 32; ++j) sums[j] += partial[part * Text::SUMS + threadIdx.x % 32 + 32 * j] * share;
  }
  Element* out = static_cast<Element*>(p.out) + (static_cast<int64_t>(row) * p.heads + head) * HEAD_DIM;
#pragma unroll
  for (int j = 0; j < HEAD_DIM / 32; ++j) plain::from_float(sums[j] / total, out[threadIdx.x % 32 + 32 * j]);
}

}  // namespace dalle::cuda
