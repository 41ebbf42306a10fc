// Threads that own rows of a call, whose columns lie in their registers: a block that owns a row, or a cluster of
// blocks that owns rows which lie next to each other. CUDA only.
//
// Kernels see either as a Team: each of its threads has a row(), and GROUPS groups of four columns of it, which are the
// columns of a Philox counter; load() and store() take the thread's columns, merge() merges statistics over the threads
// of each row.
#pragma once

#include "common/cluster.h"
#include "common/pack.h"
#include "gumbel_softmax/gumbel_softmax.h"

namespace dalle::cuda {

constexpr int WARP = 32, GROUP = 4;

template <int GROUPS>
using Elements = float[GROUPS][GROUP];

// How a kernel is launched: the threads of a block, and how many blocks make a cluster.
struct TeamShape {
  unsigned blocks, threads, cluster;
};

// The least power of two that is no less.
__host__ __device__ constexpr int power_of_two_from(int number) {
  int power = 1;
  while (power < number) power *= 2;
  return power;
}

constexpr int64_t whole_multiple(int64_t count, int64_t of) { return (count + of - 1) / of * of; }

// Where a row begins; there are fewer than 2^31 rows.
__device__ __forceinline__ int64_t row_place(const Strided& rows, uint32_t row) {
  int64_t place = 0;
#pragma unroll 1
  for (int d = rows.dims - 1; d > 0; --d) {
    const uint32_t size = static_cast<uint32_t>(rows.sizes[d]), rest = row / size;
    place += (row - rest * size) * rows.strides[d];
    row = rest;
  }
  return place + row * rows.strides[0];
}

// A row of a tensor.
template <class T>
struct Row {
  T* data;
  int64_t column_stride;

  __device__ __forceinline__ Row(const RowTensor& tensor, uint32_t row)
      : data(static_cast<T*>(tensor.data) + row_place(tensor.rows, row)), column_stride(tensor.column_stride) {}
};

// The row's number in a tensor of one column.
__device__ __forceinline__ float row_number(const RowTensor& tensor, uint32_t row) {
  return static_cast<const float*>(tensor.data)[row_place(tensor.rows, row)];
}

// Merges the statistics of lanes that are `from`, 2 * `from`, .. apart, below `to`; always in the same order.
template <class Statistics>
__device__ __forceinline__ void merge_lanes(Statistics& statistics, int from, int to) {
  constexpr unsigned ALL = 0xffffffffu;
  if constexpr (Statistics::LARGEST > 0) {
    float largest[Statistics::LARGEST];
#pragma unroll
    for (int i = 0; i < Statistics::LARGEST; ++i) largest[i] = statistics.largest[i];
#pragma unroll
    for (int distance = from; distance < to; distance *= 2) {
#pragma unroll
      for (float& number : largest) number = fmaxf(number, __shfl_xor_sync(ALL, number, distance));
    }
    statistics.rescale(largest);
  }
#pragma unroll
  for (int distance = from; distance < to; distance *= 2) {
#pragma unroll
    for (int i = 0; i < Statistics::SUMS; ++i) {
      statistics.sums[i] += __shfl_xor_sync(ALL, statistics.sums[i], distance);
    }
  }
}

// The numbers of some statistics in shared memory, each of them `pitch` behind the one before.
template <class Statistics, class Put>
__device__ __forceinline__ void put_statistics(const Statistics& statistics, float* shared, int pitch, const Put& put) {
#pragma unroll
  for (int i = 0; i < Statistics::LARGEST; ++i) put(shared + i * pitch, statistics.largest[i]);
#pragma unroll
  for (int i = 0; i < Statistics::SUMS; ++i) put(shared + (Statistics::LARGEST + i) * pitch, statistics.sums[i]);
}
template <class Statistics>
__device__ __forceinline__ void get_statistics(Statistics& statistics, const float* shared, int pitch) {
#pragma unroll
  for (int i = 0; i < Statistics::LARGEST; ++i) statistics.largest[i] = shared[i * pitch];
#pragma unroll
  for (int i = 0; i < Statistics::SUMS; ++i) statistics.sums[i] = shared[(Statistics::LARGEST + i) * pitch];
}

// A block that owns one row. WHOLE: rows are made of whole packs, which are read and written at once.
template <class T, int GROUPS_, int MOST_THREADS_, int LEAST_BLOCKS_, bool WHOLE>
class RowBlock {
 public:
  static constexpr int GROUPS = GROUPS_, MOST_THREADS = MOST_THREADS_, LEAST_BLOCKS = LEAST_BLOCKS_;
  static constexpr int LEAST_BLOCKS_HARD = LEAST_BLOCKS, LEAST_BLOCKS_HARD_WITH_KL = 1;  // of backward; of forward
  using Columns = Elements<GROUPS>;
  using Element = T;
  template <class Statistics>
  struct Shared {
    float warps[Statistics::LARGEST + Statistics::SUMS][WARP];
  };

  // Whether the tensor's rows are made of whole packs.
  static bool is_whole(const RowTensor& tensor, int64_t columns) {
    bool whole = tensor.column_stride == 1 && columns % PACK == 0 &&
                 reinterpret_cast<uintptr_t>(tensor.data) % ACCESS_BYTES == 0;
    for (int d = 0; d < tensor.rows.dims; ++d) whole &= tensor.rows.strides[d] % PACK == 0;
    return whole;
  }

  // Whether the registers hold rows of so many columns; clusters have at most so many blocks on this GPU.
  static bool fit(int64_t columns, uint32_t rows, unsigned, TeamShape& shape) {
    const int64_t threads = whole_multiple(columns, GROUPS * GROUP * WARP) / (GROUPS * GROUP);
    shape = {rows, static_cast<unsigned>(threads), 1};
    return threads <= MOST_THREADS;
  }

  __device__ __forceinline__ RowBlock(uint32_t, int64_t columns) : columns_(static_cast<int>(columns)) {}

  // Called once, before the first merge().
  static __device__ __forceinline__ void meet() {}

  static __device__ __forceinline__ uint32_t row() { return blockIdx.x; }
  // Whether it is this thread that writes the numbers of its row.
  static __device__ __forceinline__ bool writes_row() { return threadIdx.x == 0; }

  __device__ __forceinline__ Row<T> row_of(const RowTensor& tensor) const { return Row<T>(tensor, row()); }

  // The first column of a group.
  static __device__ __forceinline__ int column(int group) {
    constexpr int IN_PACK = PACK / GROUP;
    return ((group / IN_PACK) * blockDim.x + threadIdx.x) * PACK + (group % IN_PACK) * GROUP;
  }
  // The word of the Philox counter that its columns share.
  static __device__ __forceinline__ uint32_t counter(int group) {
    return static_cast<uint32_t>(column(group)) / GROUP;
  }

  // Of the groups from BEGIN to END; beyond the last column, `other`.
  template <int BEGIN = 0, int END = GROUPS>
  __device__ __forceinline__ void load(const Row<T>& of, float other, Columns& values) const {
    if constexpr (WHOLE) {
#pragma unroll
      for (int group = BEGIN; group < END; group += PACK / GROUP) {
        float numbers[PACK];
#pragma unroll
        for (float& number : numbers) number = other;
        if (column(group) < columns_) numbers_of(load_pack<PACK>(of.data + column(group), 0), numbers);
#pragma unroll
        for (int i = 0; i < PACK; ++i) values[group + i / GROUP][i % GROUP] = numbers[i];
      }
    } else {
#pragma unroll
      for (int group = BEGIN; group < END; ++group) {
#pragma unroll
        for (int i = 0; i < GROUP; ++i) {
          const int at = column(group) + i;
          values[group][i] = at < columns_ ? number_of(of.data[at * of.column_stride]) : other;
        }
      }
    }
  }

  // Of the logits or grad_y.
  template <int BEGIN = 0, int END = GROUPS>
  __device__ __forceinline__ void load_given(const Row<T>& of, float other, Columns& values) const {
    load<BEGIN, END>(of, other, values);
  }

  template <int BEGIN = 0, int END = GROUPS>
  __device__ __forceinline__ void store(const Row<T>& of, const Columns& values) const {
    if constexpr (WHOLE) {
#pragma unroll
      for (int group = BEGIN; group < END; group += PACK / GROUP) {
        float numbers[PACK];
#pragma unroll
        for (int i = 0; i < PACK; ++i) numbers[i] = values[group + i / GROUP][i % GROUP];
        if (column(group) < columns_) store_pack(of.data + column(group), 0, rounded_pack<T>(numbers));
      }
    } else {
#pragma unroll
      for (int group = BEGIN; group < END; ++group) {
#pragma unroll
        for (int i = 0; i < GROUP; ++i) {
          const int at = column(group) + i;
          const float number[1] = {values[group][i]};
          if (at < columns_) of.data[at * of.column_stride] = rounded_pack<T>(number).elements[0];
        }
      }
    }
  }

  // The statistics of all threads; another `shared` each time.
  template <class Statistics>
  static __device__ __forceinline__ void merge(Statistics& statistics, Shared<Statistics>& shared) {
    const int warps = blockDim.x / WARP, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    merge_lanes(statistics, 1, WARP);
    if (warps == 1) return;
    if (lane == 0) {
      put_statistics(statistics, shared.warps[0] + warp, WARP, [](float* place, float number) { *place = number; });
    }
    __syncthreads();
    const int width = power_of_two_from(warps), from = lane & (width - 1);
    if (from < warps) {
      get_statistics(statistics, shared.warps[0] + from, WARP);
    } else {
      statistics.clear();
    }
    merge_lanes(statistics, 1, width);
  }

 private:
  static constexpr int PACK = pack_size<T>();

  int columns_;
};

// How the tensors of a cluster lie.
enum class Layout {
  ANY,    // any strides, any number of columns
  WHOLE,  // any strides; no thread has columns beyond the last
  MIXED,  // WHOLE, and columns of the given tensors, logits and grad_y, lie next to each other, by aligned groups
};

// A cluster of blocks that owns ROWS rows, such as lie next to each other where columns do not (dim = 1 of NCHW). Eight
// lanes take a column of the rows, 32 bytes in float32: as little as memory gives at once. The four lanes of a row take
// sixteen columns, whole pieces of 32 bytes too where it is columns that lie next to each other (channels_last).
template <class T, int GROUPS_, int MOST_THREADS_, int LEAST_BLOCKS_, int ROWS_, Layout LAYOUT>
class RowCluster {
 public:
  static constexpr int GROUPS = GROUPS_, MOST_THREADS = MOST_THREADS_, ROWS = ROWS_;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  static constexpr int LEAST_BLOCKS = 1;
#else
  static constexpr int LEAST_BLOCKS = LEAST_BLOCKS_;
#endif
  static constexpr int LEAST_BLOCKS_HARD = 1, LEAST_BLOCKS_HARD_WITH_KL = LEAST_BLOCKS;
  using Columns = Elements<GROUPS>;
  using Element = T;
  template <class Statistics>
  struct Shared {
    static constexpr int COUNT = Statistics::LARGEST + Statistics::SUMS;
    float warps[COUNT][MOST_THREADS / WARP][ROWS], blocks[COUNT][MOST_CLUSTER][ROWS];
  };

  // Whether rows of so many columns fit, and for other layouts than ANY leave no thread without columns.
  static bool fit(int64_t columns, uint32_t rows, unsigned most_blocks, TeamShape& shape) {
    const int64_t threads = whole_multiple(columns * ROWS, GROUPS * GROUP * WARP) / (GROUPS * GROUP);
    if (threads > most_blocks * MOST_THREADS) return false;
    const unsigned blocks = power_of_two_from(static_cast<int>((threads + MOST_THREADS - 1) / MOST_THREADS));
    if (LAYOUT != Layout::ANY && columns * ROWS != static_cast<int64_t>(blocks) * MOST_THREADS * GROUPS * GROUP) {
      return false;
    }
    shape = {static_cast<unsigned>(whole_multiple(rows, ROWS) / ROWS * blocks),
             static_cast<unsigned>(blocks > 1 ? MOST_THREADS : threads), blocks};
    return true;
  }

  // Whether columns of the tensor lie next to each other, by aligned groups.
  static bool is_near(const RowTensor& tensor) {
    bool near = tensor.column_stride == 1 && reinterpret_cast<uintptr_t>(tensor.data) % (GROUP * sizeof(T)) == 0;
    for (int d = 0; d < tensor.rows.dims; ++d) near &= tensor.rows.strides[d] % GROUP == 0;
    return near;
  }

  __device__ __forceinline__ RowCluster(uint32_t rows, int64_t columns)
      : rows_(rows), columns_(static_cast<int>(columns)), blocks_(cluster_blocks()), rank_(cluster_rank()) {
    cluster_arrive();
  }

  // No block writes into the memory of another that has not begun.
  static __device__ __forceinline__ void meet() { cluster_wait(); }

  __device__ __forceinline__ uint32_t row() const { return own_row() < rows_ ? own_row() : rows_ - 1; }
  __device__ __forceinline__ bool writes_row() const {
    return rank_ == 0 && threadIdx.x < ROWS && own_row() < rows_;
  }

  __device__ __forceinline__ Row<T> row_of(const RowTensor& tensor) const { return Row<T>(tensor, row()); }

  __device__ __forceinline__ int column(int group) const { return counter(group) * GROUP; }
  __device__ __forceinline__ uint32_t counter(int group) const {
    return (rank_ * GROUPS + group) * lanes() + threadIdx.x / ROWS;
  }

  template <int BEGIN = 0, int END = GROUPS>
  __device__ __forceinline__ void load(const Row<T>& of, float other, Columns& values) const {
#pragma unroll
    for (int group = BEGIN; group < END; ++group) {
      const T* at = of.data + column(group) * of.column_stride;
#pragma unroll
      for (int i = 0; i < GROUP; ++i) {
        values[group][i] = has(group, i) ? number_of(*at) : other;
        at += of.column_stride;
      }
    }
  }

  // Of the logits or grad_y.
  template <int BEGIN = 0, int END = GROUPS>
  __device__ __forceinline__ void load_given(const Row<T>& of, float other, Columns& values) const {
    if constexpr (LAYOUT == Layout::MIXED) {
#pragma unroll
      for (int group = BEGIN; group < END; ++group) {
        numbers_of(load_pack<GROUP>(of.data + column(group), 0), values[group]);
      }
    } else {
      load<BEGIN, END>(of, other, values);
    }
  }

  template <int BEGIN = 0, int END = GROUPS>
  __device__ __forceinline__ void store(const Row<T>& of, const Columns& values) const {
    if (own_row() >= rows_) return;
#pragma unroll
    for (int group = BEGIN; group < END; ++group) {
      T* at = of.data + column(group) * of.column_stride;
#pragma unroll
      for (int i = 0; i < GROUP; ++i) {
        const float number[1] = {values[group][i]};
        if (has(group, i)) *at = rounded_pack<T>(number).elements[0];
        at += of.column_stride;
      }
    }
  }

  // The statistics of each row, over lanes, warps and blocks; another `shared` each time.
  template <class Statistics>
  __device__ __forceinline__ void merge(Statistics& statistics, Shared<Statistics>& shared) const {
    const int warps = blockDim.x / WARP, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int part = lane / ROWS, own = lane % ROWS;
    merge_lanes(statistics, ROWS, WARP);
    if (lane < ROWS) {
      put_statistics(statistics, &shared.warps[0][warp][lane], MOST_THREADS / WARP * ROWS,
                     [](float* place, float number) { *place = number; });
    }
    __syncthreads();
    if (warp == 0) {
      merge_parts(statistics, &shared.warps[0][0][own], MOST_THREADS / WARP * ROWS, part, warps);
      for (int block = part; block < blocks_; block += PARTS) {
        put_statistics(statistics, &shared.blocks[0][rank_][own], MOST_CLUSTER * ROWS,
                       [block](float* place, float number) { store_to_block(place, block, number); });
      }
    }
    cluster_arrive();
    cluster_wait();
    merge_parts(statistics, &shared.blocks[0][0][own], MOST_CLUSTER * ROWS, part, blocks_);
  }

 private:
  static constexpr int PARTS = WARP / ROWS;  // lanes of a warp that have the same row

  // Lane `part` of a row takes numbers part, part + PARTS, .. of `count`, which are ROWS apart; then the lanes merge.
  template <class Statistics>
  static __device__ __forceinline__ void merge_parts(Statistics& statistics, const float* shared, int pitch, int part,
                                                     int count) {
    statistics.clear();
    for (int i = part; i < count; i += PARTS) {
      Statistics other = statistics;
      get_statistics(other, shared + i * ROWS, pitch);
      statistics.add(other);
    }
    merge_lanes(statistics, ROWS, WARP);
  }

  // Threads of the block that have the same row.
  static __device__ __forceinline__ int lanes() {
    return (LAYOUT == Layout::ANY ? static_cast<int>(blockDim.x) : MOST_THREADS) / ROWS;
  }
  __device__ __forceinline__ bool has(int group, int i) const {
    return LAYOUT != Layout::ANY || column(group) + i < columns_;
  }

  __device__ __forceinline__ uint32_t own_row() const {
    return blockIdx.x / blocks_ * ROWS + threadIdx.x % ROWS;
  }

  uint32_t rows_;
  int columns_, blocks_, rank_;
};

}  // namespace dalle::cuda
