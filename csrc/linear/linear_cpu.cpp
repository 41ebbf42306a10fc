// A linear layer of few rows on the CPU. Threads share the outputs. The rows of x, as float32, stay in the cache, and
// every weight is read once from memory, in the layout that it has; nothing is packed.
#include "linear/linear.h"

#include <cstdlib>

#include "common/integer.h"
#include "common/parallel.h"
#include "common/row_products.h"

namespace dalle::DALLE_ISA_NAMESPACE {
namespace {

constexpr int64_t CHUNK = 512;            // inputs summed at a time: a tile of that length fits the L1 cache
constexpr int64_t BLOCK = TILE_PRODUCTS;  // outputs at a time: a multiple of every tile's columns
constexpr int64_t MOST_ROWS = 64;         // at a time
constexpr int64_t GRAIN = 16384;          // multiplications or copies that are worth a thread
constexpr int64_t PADDING = 16;           // floats after each row of x, so that rows a power of two long spread out

template <class T>
void widen(const T* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += Vector::width) store_first(to + i, count - i, load_first(from + i, count - i));
}

// A block of outputs for a panel of rows.
template <class T, class Out>
struct Panel {
  const Linear& p;
  const float* x;
  int64_t x_stride, rows;
  Out* out;

  // sums[r * BLOCK + c], or 0 at the first input, plus the products of ROWS rows and `count` outputs over one chunk.
  template <int ROWS>
  void add_products(int64_t row, int64_t output, int64_t count, int64_t input, float* sums) const {
    constexpr int COLUMNS = tile_columns(ROWS);
    const int64_t inputs = smaller(CHUNK, p.inputs - input);
    // The weights that this place of the tile takes next: the chunk after this one, or the first of the next block.
    int64_t ahead = input + CHUNK < p.inputs ? CHUNK : BLOCK * p.weight_stride - input;
    if (row > 0) ahead = 0;  // fetched already
    const T* weight = static_cast<const T*>(p.weight) + output * p.weight_stride + input;
    for (int64_t first = 0; first < count; first += COLUMNS) {
      const T* w[COLUMNS];
      for (int c = 0; c < COLUMNS; ++c) w[c] = weight + smaller(first + c, count - 1) * p.weight_stride;
      float products[ROWS * COLUMNS];
      row_products<ROWS>(x + row * x_stride + input, x_stride, w, inputs, ahead, products);
      for (int r = 0; r < ROWS; ++r) {
        float* sum = sums + (row + r) * BLOCK + first;
        for (int c = 0; c < COLUMNS; ++c) sum[c] = (input == 0 ? 0.0f : sum[c]) + products[r * COLUMNS + c];
      }
    }
  }

  void block(int64_t output) const {
    float sums[MOST_ROWS * BLOCK];
    const int64_t count = smaller(BLOCK, p.outputs - output);
    const int64_t tiles = (rows + TILE_MOST_ROWS - 1) / TILE_MOST_ROWS;
    for (int64_t input = 0; input < p.inputs; input += CHUNK) {
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t row = tile * rows / tiles;
        switch ((tile + 1) * rows / tiles - row) {
          case 1: add_products<1>(row, output, count, input, sums); break;
          case 2: add_products<2>(row, output, count, input, sums); break;
          case 3: add_products<3>(row, output, count, input, sums); break;
          default: add_products<4>(row, output, count, input, sums);
        }
      }
    }
    const T* bias = static_cast<const T*>(p.bias);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < count; ++c) {
        const float offset = bias == nullptr ? 0.0f : to_float(bias[output + c]);
        from_float(sums[r * BLOCK + c] + offset, out[r * p.outputs + output + c]);
      }
    }
  }
};

template <class T, class Out>
const char* run(const Linear& p) {
  const int64_t x_stride = p.inputs + PADDING;
  float* x = static_cast<float*>(malloc(p.rows * x_stride * sizeof(float)));
  if (x == nullptr) return "not enough memory for the rows in float32";
  parallel_for(p.rows, (GRAIN + p.inputs - 1) / p.inputs, p.threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      widen(static_cast<const T*>(p.x) + r * p.x_stride, p.inputs, x + r * x_stride);
    }
  });
  const int64_t blocks = (p.outputs + BLOCK - 1) / BLOCK, block_work = p.rows * p.inputs * BLOCK;
  parallel_for(blocks, (GRAIN + block_work - 1) / block_work, p.threads, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t r = 0; r < p.rows; r += MOST_ROWS) {
        Out* out = static_cast<Out*>(p.out) + r * p.outputs;
        Panel<T, Out>{p, x + r * x_stride, x_stride, smaller(MOST_ROWS, p.rows - r), out}.block(b * BLOCK);
      }
    }
  });
  free(x);
  return nullptr;
}

}  // namespace

const char* linear(const Linear& p) {
  const bool same = p.out_dtype == p.dtype;
  switch (p.dtype) {
    case Dtype::float32: return run<float, float>(p);
    case Dtype::bfloat16: return same ? run<BFloat16, BFloat16>(p) : run<BFloat16, float>(p);
    case Dtype::float16: return same ? run<Half, Half>(p) : run<Half, float>(p);
    default: return "expected float32, float16 or bfloat16";
  }
}

}  // namespace dalle::DALLE_ISA_NAMESPACE
