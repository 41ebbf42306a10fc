#include "common/cuda.h"
#include "powersgd/grid.h"
#include "powersgd/mma.h"
#include "powersgd/powersgd.h"

namespace dalle::cuda {
namespace {

constexpr int THREADS = 128;
constexpr int SIDE = 64;   // of a block's tile of the result; a warp has a quarter of it
constexpr int HALF = SIDE / 2;
constexpr int DEPTH = 16;  // terms of the sums that are in shared memory at once
constexpr int PITCH = SIDE + 4;  // four rows that a half-warp reads at once lie in different banks
constexpr int EACH = SIDE * DEPTH / THREADS;  // elements of an operand that a thread fetches at once

struct Shared {
  double a[2][DEPTH][PITCH], b[2][DEPTH][PITCH];
};

// Where element e of those that a thread fetches lies in an operand's [DEPTH, SIDE].
struct Place {
  int depth, side;
};

// For rows of memory that run along the side.
__device__ Place along_side(int e) {
  const int t = threadIdx.x;
  return {t / SIDE + THREADS / SIDE * e, t % SIDE};
}

// For rows of memory that run along the depth: four neighbours of eight rows a warp, which go to different banks.
__device__ Place along_depth(int e) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  return {lane % 4 + e % 4 * 4, lane / 4 + 8 * (warp + e / 4 * 4)};
}

// A warp's quarter [32, 32] of a' b over the terms [begin, end), as 2 by 4 tiles of mma. fetch_a and fetch_b give
// element e of a thread's for the terms from a first one on, and 0 beyond the end; place_a and place_b say where it
// goes.
struct Quarter {
  double sums[2][4][4];

  template <class FetchA, class FetchB>
  __device__ void multiply(Shared& shared, int begin, int end, Place (*place_a)(int), FetchA fetch_a, FetchB fetch_b) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, place = lane % 4;
    const int row = warp / 2 * HALF + group, column = warp % 2 * HALF + group;
    decltype(fetch_a(0, 0)) next_a[EACH];
    decltype(fetch_b(0, 0)) next_b[EACH];
#pragma unroll
    for (int i = 0; i < 2 * 4 * 4; ++i) sums[i / 16][i / 4 % 4][i % 4] = 0;
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
      next_a[e] = fetch_a(begin, e);
      next_b[e] = fetch_b(begin, e);
    }
    int buffer = 0;
    for (int first = begin; first < end; first += DEPTH, buffer ^= 1) {
#pragma unroll
      for (int e = 0; e < EACH; ++e) {
        const Place a = place_a(e), b = along_side(e);
        shared.a[buffer][a.depth][a.side] = next_a[e];
        shared.b[buffer][b.depth][b.side] = next_b[e];
      }
      __syncthreads();
#pragma unroll
      for (int e = 0; e < EACH; ++e) {
        next_a[e] = fetch_a(first + DEPTH, e);
        next_b[e] = fetch_b(first + DEPTH, e);
      }
#pragma unroll
      for (int depth = 0; depth < DEPTH; depth += 8) {
        double a[2][4], b[4][2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            a[i][k] = shared.a[buffer][depth + place + k / 2 * 4][row + 16 * i + k % 2 * 8];
          }
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
          for (int k = 0; k < 2; ++k) b[j][k] = shared.b[buffer][depth + place + 4 * k][column + 8 * j];
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) multiply_add(sums[i][j], a[i], b[j]);
        }
      }
    }
    __syncthreads();
  }

  // Calls use(row, column, sum) for each element, counted within the block's tile.
  template <class Use>
  __device__ void each(Use use) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int row = warp / 2 * HALF + lane / 4, column = warp % 2 * HALF + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int k = 0; k < 4; ++k) use(row + 16 * i + k / 2 * 8, column + 8 * j + k % 2, sums[i][j][k]);
      }
    }
  }
};

__device__ bool is_done(const int* before, int matrix) { return before != nullptr && before[matrix] != 0; }

__host__ __device__ inline int tiles_of(int count) { return (count + SIDE - 1) / SIDE; }

// Block x has a tile of the result from the diagonal on, counted column by column, block y a part of the rows.
__global__ void __launch_bounds__(THREADS) gram_kernel(Gram p) {
  __shared__ Shared shared;
  if (is_done(p.before, blockIdx.z)) return;
  int j = 0, before = 0;
  while (before + j + 1 <= static_cast<int>(blockIdx.x)) before += ++j;
  const int i = blockIdx.x - before;
  const int length = (p.rows + p.parts - 1) / p.parts, begin = blockIdx.y * length, end = min(p.rows, begin + length);
  const float* input = p.input + static_cast<int64_t>(blockIdx.z) * p.rows * p.columns;
  double* out = p.out + (static_cast<int64_t>(blockIdx.z) * p.parts + blockIdx.y) * p.columns * p.columns;
  const auto fetch = [&](int tile) {
    return [=, &p](int first, int e) {
      const Place at = along_side(e);
      const int row = first + at.depth, column = tile * SIDE + at.side;
      const bool inside = row < end && column < p.columns;
      return inside ? input[static_cast<int64_t>(row) * p.columns + column] : 0.f;
    };
  };
  Quarter quarter;
  quarter.multiply(shared, begin, end, along_side, fetch(i), fetch(j));
  quarter.each([&](int row, int column, double sum) {
    const int at_row = i * SIDE + row, at_column = j * SIDE + column;
    if (at_row >= p.columns || at_column >= p.columns) return;
    const int64_t at = static_cast<int64_t>(at_row) * p.columns + at_column;
    if (blockIdx.y == 0) {  // (P + eps*I)'(P + eps*I) = P'P + eps (P + P') + eps^2 I, of P its first rows
      const double mirrored = input[static_cast<int64_t>(at_column) * p.columns + at_row];
      sum += p.eps * (input[at] + mirrored + (at_row == at_column ? p.eps : 0.0));
    }
    out[at] = sum;
  });
}

// Block x has 64 rows of the result, block y a tile of them, the longest sums first. In place it has all tiles of its
// rows, the last first: each needs only what lies left of its end.
__global__ void __launch_bounds__(THREADS) apply_kernel(Apply p) {
  __shared__ Shared shared;
  if (is_done(p.before, blockIdx.z)) return;
  const float* input = p.input + static_cast<int64_t>(blockIdx.z) * p.rows * p.columns;
  const double* inverse = p.inverse + static_cast<int64_t>(blockIdx.z) * p.columns * p.columns;
  float* out = p.out + static_cast<int64_t>(blockIdx.z) * p.rows * p.columns;
  const int first_row = blockIdx.x * SIDE, tiles = tiles_of(p.columns);
  for (int j = tiles - 1 - static_cast<int>(blockIdx.y); j >= 0; j -= gridDim.y) {
    const int end = min(p.columns, (j + 1) * SIDE);
    Quarter quarter;
    quarter.multiply(
        shared, 0, end, along_depth,
        [&](int first, int e) {
          const Place at = along_depth(e);
          const int row = first_row + at.side, column = first + at.depth;
          const bool inside = row < p.rows && column < end;
          return inside ? input[static_cast<int64_t>(row) * p.columns + column] : 0.f;
        },
        [&](int first, int e) {
          const Place at = along_side(e);
          const int row = first + at.depth, column = j * SIDE + at.side;
          const bool inside = row < end && column < p.columns;
          return inside ? inverse[static_cast<int64_t>(row) * p.columns + column] : 0.0;
        });
    quarter.each([&](int row, int column, double sum) {
      const int at_row = first_row + row, at_column = j * SIDE + column;
      if (at_row >= p.rows || at_column >= p.columns) return;
      const int64_t at = static_cast<int64_t>(at_row) * p.columns + at_column;
      out[at] = static_cast<float>(at_row < p.columns ? sum + p.eps * inverse[at] : sum);
    });
    __syncthreads();
  }
}

}  // namespace

int gram_parts(int matrices, int rows, int columns) {
  constexpr int BLOCKS = 528, SHORTEST = 256;  // four for each multiprocessor of a H100
  const int tiles = tiles_of(columns) * (tiles_of(columns) + 1) / 2 * matrices;
  const int wanted = (BLOCKS + tiles - 1) / tiles, most = (rows + SHORTEST - 1) / SHORTEST;
  return wanted < most ? wanted : most;
}

const char* gram(const Gram& p, void* stream) {
  const int tiles = tiles_of(p.columns);
  const dim3 blocks(tiles * (tiles + 1) / 2, p.parts, p.matrices);
  return launch(gram_kernel, blocks, THREADS, static_cast<cudaStream_t>(stream), p);
}

const char* apply(const Apply& p, void* stream) {
  const dim3 blocks(tiles_of(p.rows), p.input == p.out ? 1 : tiles_of(p.columns), p.matrices);
  return launch(apply_kernel, blocks, THREADS, static_cast<cudaStream_t>(stream), p);
}

}  // namespace dalle::cuda
