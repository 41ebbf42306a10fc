// Blocks of rows and tiles of their columns: how the kernels of this family see a tensor of any strides and dtype.
//
// A tile holds up to TILE_COLUMNS columns of a block's rows as float32, [column][row]: the lanes of a Vector are rows.
// Whatever is computed for a row then depends on nothing but the row, and is the same for every layout, split and
// number of threads. Where rows follow each other in memory (dim = 1 of NCHW) a column of the tile is one run; where
// columns do (dim = -1) the tile is transposed on its way, eight by eight. A sweep that only reads may take the rows of
// the first kind where they lie: as Columns.
#pragma once

#include "common/scratch.h"
#include "gumbel_softmax/four.h"
#include "gumbel_softmax/gumbel_softmax.h"

namespace dalle::DALLE_ISA_NAMESPACE {

constexpr int64_t TILE_COLUMNS = 32;  // 128 bytes of float32: whole cache lines where columns are contiguous
constexpr int64_t STEP_COLUMNS = 4;   // that a Four takes
constexpr int64_t MOST_ROWS = 64;     // of a block
constexpr int64_t WIDE_ROWS = 1024;   // of a wide block: a column of float32 is then a page of 4 KiB
constexpr int64_t STRAIGHT_ROWS = WIDE_ROWS / 2;  // that are read where they lie: shorter runs come sooner as copies
constexpr int64_t LEAST_ROWS = Vector::width > 8 ? Vector::width : 8;
constexpr int64_t TILE_FLOATS = TILE_COLUMNS * MOST_ROWS;
constexpr int64_t WIDE_TILE_FLOATS = STEP_COLUMNS * WIDE_ROWS;
constexpr int64_t CACHE_LINE = 64;

// A tile's place in its block. Its columns are `pitch` floats apart: the block's rows rounded up to whole vectors. What
// lies in the lanes beyond the block's rows has no meaning.
struct Tile {
  int64_t first, columns, pitch;
  bool ends_sum;  // the last of TILE_COLUMNS columns, or of all: sums in single precision go no further

  // `most`, what any but the last has, divides TILE_COLUMNS.
  Tile(int64_t index, int64_t total, int64_t pitch_, int64_t most = TILE_COLUMNS) : first(index * most), pitch(pitch_) {
    columns = total - first < most ? total - first : most;
    ends_sum = (first + columns) % TILE_COLUMNS == 0 || first + columns == total;
  }
  // The columns rounded up to what one Philox counter gives.
  int64_t padded() const { return (columns + STEP_COLUMNS - 1) / STEP_COLUMNS * STEP_COLUMNS; }
};

// A tile's columns, `stride` elements apart, each with the numbers of all lanes in a row.
template <class T>
struct Columns {
  const T* data;
  int64_t stride;
};

// A step's columns of a vector of rows.
template <class T>
DALLE_INLINE Four load_four(const Columns<T>& from, int64_t column, int64_t lane) {
  const T* p = from.data + column * from.stride + lane;
  return {{load(p), load(p + from.stride), load(p + 2 * from.stride), load(p + 3 * from.stride)}};
}

// How a call is cut into blocks of rows. No result depends on it.
struct Blocks {
  int64_t rows, columns, pitch, count;

  // As many rows as leave what a block's sweeps share, `row_bytes` a row, in the cache given; fewer, where there would
  // be too few blocks for the threads. `least` is a multiple of LEAST_ROWS.
  Blocks(const RowTensor& tensor, int64_t columns_, int64_t row_bytes, int64_t cache, int64_t least, int threads)
      : rows(element_count(tensor.rows)), columns(columns_), pitch(MOST_ROWS) {
    while (pitch > least && (row_bytes * pitch > cache || rows < 2 * pitch * threads)) pitch /= 2;
    count_blocks();
  }
  // For sweeps that read runs of `run` rows: as many rows to a block as such a run has, or as leave a block for every
  // thread.
  void widen(int64_t run, int threads) {
    while (pitch < WIDE_ROWS && pitch < run && rows >= 2 * pitch * threads) pitch *= 2;
    count_blocks();
  }
  // The tiles of a wide block have so few columns that these are read one after the other.
  int64_t tile_columns() const { return pitch > MOST_ROWS ? STEP_COLUMNS : TILE_COLUMNS; }
  int64_t tiles() const { return (columns + tile_columns() - 1) / tile_columns(); }
  Tile tile(int64_t index) const { return Tile(index, columns, pitch, tile_columns()); }
  int64_t first(int64_t block) const { return block * pitch; }
  int64_t rows_of(int64_t block) const { return rows - first(block) < pitch ? rows - first(block) : pitch; }

 private:
  void count_blocks() { count = (rows + pitch - 1) / pitch; }
};

// How many rows follow each other in memory. `tensor.rows` must be merged.
inline int64_t run_of(const RowTensor& tensor) {
  const int last = tensor.rows.dims - 1;
  return tensor.rows.strides[last] == 1 ? tensor.rows.sizes[last] : 1;
}

// The same tensor with its rows in as few dimensions as possible.
inline RowTensor merged(const RowTensor& tensor) { return {tensor.data, merged(tensor.rows), tensor.column_stride}; }

constexpr const char* OUT_OF_MEMORY = "not enough memory for the scratch space of the threads";
// Outputs from here on leave the caches before anybody reads them.
constexpr int64_t STREAMED_BYTES = int64_t{16} << 20;

// The rows of a block of a tensor, as runs that are contiguous in memory.
class RowBlock {
 public:
  struct Run {
    int64_t offset;
    int64_t lane, count;
  };

  // `tensor.rows` must be merged.
  RowBlock(const RowTensor& tensor, int64_t first_row, int64_t rows_)
      : data(tensor.data), column_stride(tensor.column_stride), rows(rows_), runs(0) {
    const Strided& shape = tensor.rows;
    const int last = shape.dims - 1;
    const int64_t inner = shape.sizes[last];
    for (int64_t lane = 0; lane < rows; ++runs) {
      const int64_t row = first_row + lane, position = row % inner;
      const int64_t left = rows - lane < inner - position ? rows - lane : inner - position;
      const int64_t offset = row_offset(shape, row / inner) + position * shape.strides[last];
      run[runs] = {offset, lane, shape.strides[last] == 1 ? left : 1};
      lane += run[runs].count;
    }
  }

  // A column is in short pieces and a row is in one.
  bool along_columns() const { return column_stride == 1 && runs * 4 > rows; }

  // Whether a tile is read where it lies: its lanes are one long run, and its columns make whole steps.
  bool has_columns(const Tile& tile) const {
    return tile.pitch >= STRAIGHT_ROWS && runs == 1 && rows == tile.pitch && tile.columns % STEP_COLUMNS == 0;
  }
  template <class T>
  Columns<T> columns(const Tile& tile) const {
    return {static_cast<const T*>(data) + run[0].offset + tile.first * column_stride, column_stride};
  }

  void* data;
  int64_t column_stride, rows;
  int64_t runs;
  Run run[MOST_ROWS];
};

template <class T>
DALLE_INLINE void read_run(const T* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + Vector::width <= count; i += Vector::width) store(to + i, load(from + i));
  for (; i < count; ++i) to[i] = to_float(from[i]);
}

// Past the caches, so that a line need not be read before it is written and does not push out what is read again.
DALLE_INLINE void stream_line(void* to, const void* from) {
#if defined(__AVX2__)
  for (int i = 0; i < 2; ++i) {
    _mm256_stream_si256(static_cast<__m256i*>(to) + i, _mm256_loadu_si256(static_cast<const __m256i*>(from) + i));
  }
#else
  memcpy(to, from, CACHE_LINE);
#endif
}

template <class T>
DALLE_INLINE void write_run(const float* from, int64_t count, T* to, bool stream) {
  constexpr int64_t LINE = CACHE_LINE / sizeof(T);
  int64_t i = 0;
  if (stream && reinterpret_cast<uintptr_t>(to) % CACHE_LINE == 0) {
    // Converted as a whole first: a line that was just stored in narrower pieces could not be read at once.
    T lines[WIDE_ROWS];
    static_assert(WIDE_ROWS >= TILE_COLUMNS, "a run is a column or a row of a tile");
    const int64_t whole = count / LINE * LINE;
    for (int64_t j = 0; j < whole; j += Vector::width) store(lines + j, load(from + j));
    for (; i < whole; i += LINE) stream_line(to + i, lines + i);
  }
  for (; i + Vector::width <= count; i += Vector::width) store(to + i, load(from + i));
  for (; i < count; ++i) from_float(from[i], to[i]);
}

// The padding columns become `fill`. `rows` is scratch for a tile, as for store_tile.
template <class T>
DALLE_NOINLINE void load_tile(const RowBlock& block, const Tile& tile, float fill, float* rows, float* to) {
  const T* data = static_cast<const T*>(block.data) + tile.first * block.column_stride;
  const int64_t pitch = tile.pitch;
  if (block.along_columns()) {
    for (int64_t i = 0; i < block.runs; ++i) {
      for (int64_t j = 0; j < block.run[i].count; ++j) {
        read_run(data + block.run[i].offset + j, tile.columns, rows + (block.run[i].lane + j) * TILE_COLUMNS);
      }
    }
    for (int64_t c = 0; c < tile.columns; c += 8) {
      for (int64_t r = 0; r < pitch; r += 8) {
        transpose_8x8(rows + r * TILE_COLUMNS + c, TILE_COLUMNS, to + c * pitch + r, pitch);
      }
    }
  } else {
    for (int64_t c = 0; c < tile.columns; ++c) {
      const T* column = data + c * block.column_stride;
      for (int64_t i = 0; i < block.runs; ++i) {
        const RowBlock::Run& run = block.run[i];
        // Beyond the tensor's end it does nothing.
        const T* next = column + run.offset + TILE_COLUMNS * block.column_stride;
        for (int64_t r = 0; r < run.count; r += CACHE_LINE / sizeof(T)) __builtin_prefetch(next + r);
        read_run(column + run.offset, run.count, to + c * pitch + run.lane);
      }
    }
  }
  for (int64_t i = tile.columns * pitch; i < tile.padded() * pitch; ++i) to[i] = fill;
}

template <class T>
DALLE_NOINLINE void store_tile(const RowBlock& block, const Tile& tile, bool stream, const float* from, float* rows) {
  T* data = static_cast<T*>(block.data) + tile.first * block.column_stride;
  if (block.along_columns()) {
    for (int64_t r = 0; r < tile.pitch; r += 8) {
      for (int64_t c = 0; c < tile.columns; c += 8) {
        transpose_8x8(from + c * tile.pitch + r, tile.pitch, rows + r * TILE_COLUMNS + c, TILE_COLUMNS);
      }
    }
    for (int64_t i = 0; i < block.runs; ++i) {
      for (int64_t j = 0; j < block.run[i].count; ++j) {
        write_run(rows + (block.run[i].lane + j) * TILE_COLUMNS, tile.columns, data + block.run[i].offset + j, stream);
      }
    }
  } else {
    for (int64_t c = 0; c < tile.columns; ++c) {
      for (int64_t i = 0; i < block.runs; ++i) {
        const RowBlock::Run& run = block.run[i];
        write_run(from + c * tile.pitch + run.lane, run.count, data + c * block.column_stride + run.offset, stream);
      }
    }
  }
}

DALLE_INLINE void load_tile(Dtype dtype, const RowBlock& block, const Tile& tile, float fill, float* rows, float* to) {
  if (dtype == Dtype::float32) return load_tile<float>(block, tile, fill, rows, to);
  if (dtype == Dtype::float16) return load_tile<Half>(block, tile, fill, rows, to);
  load_tile<BFloat16>(block, tile, fill, rows, to);
}

DALLE_INLINE void store_tile(Dtype dtype, const RowBlock& block, const Tile& tile, bool stream, const float* from,
                             float* rows) {
  if (dtype == Dtype::float32) return store_tile<float>(block, tile, stream, from, rows);
  if (dtype == Dtype::float16) return store_tile<Half>(block, tile, stream, from, rows);
  store_tile<BFloat16>(block, tile, stream, from, rows);
}

}  // namespace dalle::DALLE_ISA_NAMESPACE
