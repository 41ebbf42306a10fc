// Products of up to eight rows with a matrix, whose bytes are all there is to them, and what stands around them in a
// layer.
//
// A block makes TILES times 16 outputs of all rows; its warps each take a run of the inputs, 32 at a time. A thread
// needs 16 bytes of each of two rows of weights, and 16 of a row of x (common/mma.h says why these do), and copies them
// for itself into a ring in shared memory: so there is no barrier but at the end, where the warps' sums meet. The
// weights are asked for before the kernels before this one have ended: as many as the ring holds into it, all into the
// L2 cache. Two blocks fit a multiprocessor, this kernel's and the next one's, so that memory is never idle.
#pragma once

#include "common/ahead.h"
#include "common/mma.h"
#include "common/pairs.h"

namespace dalle::cuda {

constexpr int MOST_ROWS = 8;

struct FewRows {
  const void *weight, *bias;            // [outputs, inputs], [outputs]
  const void *norm_weight, *norm_bias;  // [inputs], of a layer normalization before it, if NORM
  const void* x;                        // [rows, inputs]
  const void* residual;                 // [rows, outputs] or nullptr, added at the end
  void* out;                            // [rows, outputs], may be `residual`
  int rows, inputs, outputs;            // inputs a multiple of 32
  float epsilon;
};

template <class Element, bool NORM, bool GELU, int TILES>
struct FewRowsBlock {
  static constexpr int WARPS = 12, THREADS = WARPS * 32, STAGES = 6;
  static constexpr int PACKS = NORM ? 2 : 3;  // of a stage: of two rows of weights, and of x where it is as it comes
  static constexpr int RING = STAGES * PACKS * THREADS * static_cast<int>(sizeof(FourPairs));
  static constexpr int VALUES = TILES * 16 * MOST_ROWS, TURNS = (VALUES + THREADS - 1) / THREADS;
  static_assert(WARPS * VALUES * static_cast<int>(sizeof(float)) <= RING, "the ring takes the sums at the end");

  // Inputs are counted in runs of 32; a warp has so many of them, the last ones fewer.
  static __host__ __device__ int runs_of_warp(int inputs) { return (inputs / 32 + WARPS - 1) / WARPS; }
  // The ring, then for NORM the rows of x, normalized, and the normalization's weights.
  static __host__ __device__ int shared_bytes(int inputs) {
    return RING + (NORM ? runs_of_warp(inputs) * THREADS * static_cast<int>(sizeof(FourPairs)) + 4 * inputs : 0);
  }

  const FewRows& p;
  uint8_t* const memory;
  const int warp, row, lane;  // rows and lanes as common/mma.h has them
  const int begin, runs;      // the warp's runs of inputs

  __device__ FewRowsBlock(const FewRows& p_)
      : p(p_), memory(launched_shared()), warp(threadIdx.x / 32), row(threadIdx.x % 32 / 4), lane(threadIdx.x % 4),
        begin(warp * runs_of_warp(p.inputs)), runs(count_runs(p.inputs / 32 - begin, runs_of_warp(p.inputs))) {}
  __device__ static int count_runs(int left, int most) { return left < 0 ? 0 : left < most ? left : most; }

  // A place in the order in which a thread asks for its runs and takes them: tile by tile, around the ring.
  struct Cursor {
    int tile = 0, run = 0, place = 0;
    __device__ __forceinline__ void advance(int runs) {
      if (++place == STAGES) place = 0;
      if (++run == runs) run = 0, ++tile;
    }
  };

  __device__ __forceinline__ FourPairs& ring(const Cursor& at, int pack) const {
    return reinterpret_cast<FourPairs*>(memory)[(at.place * PACKS + pack) * THREADS + threadIdx.x];
  }
  __device__ __forceinline__ FourPairs& normalized(int run) const {
    return reinterpret_cast<FourPairs*>(memory + RING)[run * THREADS + threadIdx.x];
  }
  __device__ __forceinline__ FourPairs* norm_weights() const {
    return reinterpret_cast<FourPairs*>(memory + RING) + runs_of_warp(p.inputs) * THREADS;
  }
  __device__ __forceinline__ int first_output() const { return blockIdx.x * TILES * 16; }
  __device__ __forceinline__ int input(int run) const { return (begin + run) * 32 + lane * 8; }
  __device__ __forceinline__ const Element* weights(int output, int column) const {
    const int64_t real = output < p.outputs ? output : p.outputs - 1;
    return static_cast<const Element*>(p.weight) + real * p.inputs + column;
  }

  __device__ __forceinline__ void ask_weights(Cursor& at) const {
    if (at.tile == TILES || runs == 0) return;
    const int output = first_output() + at.tile * 16 + row, column = input(at.run);
    copy_pack(&ring(at, 0), weights(output, column));
    copy_pack(&ring(at, 1), weights(output + 8, column));
    at.advance(runs);
  }
  __device__ __forceinline__ void ask_x(Cursor& at) const {
    if (NORM || at.tile == TILES || runs == 0) return;
    const int real = row < p.rows ? row : p.rows - 1;  // what other columns of the sums hold nobody reads
    copy_pack(&ring(at, PACKS - 1),
              static_cast<const Element*>(p.x) + static_cast<int64_t>(real) * p.inputs + input(at.run));
    at.advance(runs);
  }

  // All that does not depend on the kernels before.
  __device__ __forceinline__ void ask_ahead(Cursor& at) const {
    if constexpr (NORM) {
      const int packs = p.inputs / 8;
      for (int i = threadIdx.x; i < 2 * packs; i += THREADS) {
        const void* from = i < packs ? p.norm_weight : p.norm_bias;
        copy_pack(norm_weights() + i, static_cast<const FourPairs*>(from) + i % packs);
      }
      copies_commit();
    }
    for (int stage = 0; stage < STAGES; ++stage) ask_weights(at), copies_commit();
    // One row each: a bulk prefetch of more would wait for its turn behind those of the whole grid.
    for (int i = threadIdx.x; i < TILES * 16 && first_output() + i < p.outputs; i += THREADS) {
      bring_to_cache(weights(first_output() + i, 0), static_cast<uint32_t>(p.inputs) * 2);
    }
  }

  // The rows of x that the thread needs, normalized and rounded, into its part of shared memory.
  __device__ void normalize() const {
    __shared__ float parts[2][WARPS][MOST_ROWS];
    const bool is_row = row < p.rows;
    const Element* x = static_cast<const Element*>(p.x) + static_cast<int64_t>(is_row ? row : 0) * p.inputs;
    float sum = 0;
    constexpr int BATCH = 5;
    for (int first = 0; first < runs; first += BATCH) {
      FourPairs packs[BATCH];
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
        packs[i] = FourPairs{};
        if (first + i < runs) packs[i] = load_written(reinterpret_cast<const FourPairs*>(x + input(first + i)));
      }
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
        if (first + i >= runs) break;
        float numbers[8];
        numbers_of(packs[i], numbers, Element{});
        for (float number : numbers) sum += number;
        normalized(first + i) = packs[i];
      }
    }
    const float mean = total_of(sum, parts[0]) / p.inputs;
    float squares = 0;
    for (int run = 0; run < runs; ++run) {
      float numbers[8];
      numbers_of(normalized(run), numbers, Element{});
      for (float number : numbers) squares = fmaf(number - mean, number - mean, squares);
    }
    copies_wait<STAGES>();  // the normalization's weights; the barrier below shows them to all
    const float factor = 1 / sqrtf(total_of(squares, parts[1]) / p.inputs + p.epsilon);
    for (int run = 0; run < runs; ++run) {
      float numbers[8], scales[8], shifts[8];
      numbers_of(normalized(run), numbers, Element{});
      numbers_of(norm_weights()[input(run) / 8], scales, Element{});
      numbers_of(norm_weights()[(p.inputs + input(run)) / 8], shifts, Element{});
      for (int i = 0; i < 8; ++i) numbers[i] = fmaf((numbers[i] - mean) * factor, scales[i], shifts[i]);
      normalized(run) = rounded_pairs(numbers, Element{});
    }
  }

  // The sum over all threads of a row.
  __device__ float total_of(float part, float (&parts)[WARPS][MOST_ROWS]) const {
    part += __shfl_xor_sync(~0u, part, 1);
    part += __shfl_xor_sync(~0u, part, 2);
    if (lane == 0) parts[warp][row] = part;
    __syncthreads();
    float total = 0;
    for (int i = 0; i < WARPS; ++i) total += parts[i][row];
    return total;
  }

  __device__ void run() const {
    Cursor next_weights, next_x, taken;
    ask_ahead(next_weights);
    // What the end needs, of the block's values number threadIdx.x and so on: four of each thread of a warp, by tiles.
    float biases[TURNS], residuals[TURNS];
    const auto output_of = [&](int value) {
      return first_output() + value / 128 * 16 + value % 128 / 16 + (value % 4 / 2) * 8;
    };
    const auto row_of = [](int value) { return value % 16 / 4 * 2 + value % 2; };
    const auto is_value = [&](int value) {
      return value < VALUES && output_of(value) < p.outputs && row_of(value) < p.rows;
    };
    const auto place_of = [&](int value) { return static_cast<int64_t>(row_of(value)) * p.outputs + output_of(value); };
#pragma unroll
    for (int i = 0; i < TURNS; ++i) {
      const int value = i * THREADS + threadIdx.x;
      biases[i] = is_value(value) ? plain::to_float(static_cast<const Element*>(p.bias)[output_of(value)]) : 0;
    }
    await_last_kernel();
    for (int stage = 0; !NORM && stage < STAGES; ++stage) ask_x(next_x), copies_commit();
#pragma unroll
    for (int i = 0; i < TURNS; ++i) {
      const int value = i * THREADS + threadIdx.x;
      const bool adds = p.residual != nullptr && is_value(value);
      const Element* const residual = static_cast<const Element*>(p.residual);
      residuals[i] = adds ? plain::to_float(load_written(residual + place_of(value))) : 0;
    }
    if constexpr (NORM) normalize();

    float sums[TILES][4] = {};
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      float others[4] = {};  // a second chain
      for (int i = 0; i < runs; ++i) {
        copies_wait<STAGES - 1>();
        const FourPairs upper = ring(taken, 0), lower = ring(taken, 1);
        const FourPairs right = NORM ? normalized(i) : ring(taken, PACKS - 1);
        multiply_add<Element>(sums[tile], upper.pairs[0], lower.pairs[0], upper.pairs[1], lower.pairs[1],
                              right.pairs[0], right.pairs[1]);
        multiply_add<Element>(others, upper.pairs[2], lower.pairs[2], upper.pairs[3], lower.pairs[3], right.pairs[2],
                              right.pairs[3]);
        ask_weights(next_weights), ask_x(next_x), copies_commit();
        taken.advance(runs);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[tile][i] += others[i];
    }
    copies_wait<0>();
    __syncthreads();
    float4* const partial = reinterpret_cast<float4*>(memory);
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      const float(&of_tile)[4] = sums[tile];
      partial[(warp * TILES + tile) * 32 + threadIdx.x % 32] = float4{of_tile[0], of_tile[1], of_tile[2], of_tile[3]};
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < TURNS; ++i) {
      const int value = i * THREADS + threadIdx.x;
      if (!is_value(value)) continue;
      float sum = 0;
      for (int part = 0; part < WARPS; ++part) sum += reinterpret_cast<const float*>(memory)[part * VALUES + value];
      sum += biases[i];
      if (GELU) sum = 0.5f * sum * (1 + erff(sum * 0.7071067811865476f));
      plain::from_float(sum + residuals[i], static_cast<Element*>(p.out)[place_of(value)]);
    }
  }
};

template <class Element, bool NORM, bool GELU, int TILES>
__global__ void __launch_bounds__(384, 2) few_rows(const __grid_constant__ FewRows p) {
  FewRowsBlock<Element, NORM, GELU, TILES>(p).run();
}

}  // namespace dalle::cuda
