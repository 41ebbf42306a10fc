// The relaxed code vectors on the CPU: a tile of the sample is drawn, multiplied with its rows of the codebook and
// forgotten.
#include "common/parallel.h"
#include "gumbel_softmax/product.h"
#include "gumbel_softmax/sample.h"

namespace dalle::DALLE_ISA_NAMESPACE {
namespace {

constexpr int64_t LEAST_PRODUCT_ROWS = LEAST_ROWS > PANEL ? LEAST_ROWS : PANEL;

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// The codebook's rows of a tile as [column][width], the width rounded up to panels of zeros.
template <class T>
void load_codes(const Codebook& codebook, const Tile& tile, int64_t width, float* to) {
  for (int64_t c = 0; c < tile.columns; ++c, to += width) {
    const T* code = static_cast<const T*>(codebook.data) + (tile.first + c) * codebook.column_stride;
    if (codebook.width_stride == 1) {
      read_run(code, codebook.width, to);
    } else {
      for (int64_t d = 0; d < codebook.width; ++d) to[d] = to_float(code[d * codebook.width_stride]);
    }
    for (int64_t d = codebook.width; d < width; ++d) to[d] = 0.0f;
  }
}

void load_codes(const Codebook& codebook, const Tile& tile, int64_t width, float* to) {
  if (codebook.dtype == Dtype::float32) return load_codes<float>(codebook, tile, width, to);
  if (codebook.dtype == Dtype::float16) return load_codes<Half>(codebook, tile, width, to);
  load_codes<BFloat16>(codebook, tile, width, to);
}

template <class T>
void store_codes(const Codebook& codebook, const Tile& tile, const float* from, int64_t width) {
  for (int64_t c = 0; c < tile.columns; ++c, from += width) {
    T* code = static_cast<T*>(codebook.data) + (tile.first + c) * codebook.column_stride;
    if (codebook.width_stride == 1) {
      write_run(from, codebook.width, code, false);
    } else {
      for (int64_t d = 0; d < codebook.width; ++d) from_float(from[d], code[d * codebook.width_stride]);
    }
  }
}

void store_codes(const Codebook& codebook, const Tile& tile, const float* from, int64_t width) {
  if (codebook.dtype == Dtype::float32) return store_codes<float>(codebook, tile, from, width);
  if (codebook.dtype == Dtype::float16) return store_codes<Half>(codebook, tile, from, width);
  store_codes<BFloat16>(codebook, tile, from, width);
}

int64_t forward_floats(int64_t width, int64_t pitch) { return 3 * TILE_FLOATS + (TILE_COLUMNS + pitch) * width; }

// `width` is the codebook's, rounded up to panels.
void forward_block(const GumbelCodebook& p, const Call& call, int64_t width, int64_t block, float* scratch) {
  const int64_t first = call.blocks.first(block), rows = call.blocks.rows_of(block), pitch = call.blocks.pitch;
  const RowBlock logits(p.logits, first, rows), embedding(p.embedding, first, rows);
  float *given = scratch, *values = given + TILE_FLOATS, *turned = values + TILE_FLOATS;
  float *codes = turned + TILE_FLOATS, *sums = codes + TILE_COLUMNS * width;  // sums: [width][row]
  const BlockNoise noise = call.noise(block);
  RunningSoftmax softmax(noise, call.factor, pitch);
  Posterior<> posterior(pitch);
  memset(sums, 0, width * pitch * sizeof(float));
  for (int64_t t = 0; t < tiles_of(p.columns); ++t) {
    const Tile tile(t, p.columns, pitch);
    float shrink[MOST_ROWS];
    load_tile(p.dtype, logits, tile, -INFINITY_FLOAT, turned, given);
    load_codes(p.codebook, tile, width, codes);
    softmax.draw(tile, given, values, shrink);
    posterior.add(tile, Columns<float>{given, pitch});
    for (int64_t d = 0; d < p.codebook.width; ++d) {
      float* row = sums + d * pitch;
      for (int64_t r = 0; r < pitch; r += Vector::width) store(row + r, load(row + r) * load(shrink + r));
    }
    multiply({codes, 1, width, values, pitch, sums, pitch}, p.codebook.width, tile.columns, pitch);
  }
  float inverse[MOST_ROWS];
  for (int64_t r = 0; r < pitch; ++r) inverse[r] = static_cast<float>(1.0 / softmax.sum[r]);
  for (int64_t t = 0; t < tiles_of(p.codebook.width); ++t) {
    const Tile tile(t, p.codebook.width, pitch);
    scale_tile(tile, sums + tile.first * pitch, inverse, values);
    store_tile(p.codebook.dtype, embedding, tile, false, values, turned);
  }
  for (int64_t r = 0; r < rows; ++r) p.kl[first + r] = posterior.kl(r, p.columns);
}

// ---- Backward. First every row's numbers; then tile after tile of the codebook, each over all rows in order, so that
//      its gradient is a sum whose order does not depend on the threads. The noise is drawn each time, and the gradient
//      of the sample is the same product: where y is 1 but for rounding, the two must cancel.

// What the second pass needs of a block's rows.
struct BlockNumbers {
  float largest[MOST_ROWS], inverse_sum[MOST_ROWS];
  SampleGradient<> sample;
  PosteriorGradient<> posterior;
};

struct BackwardScratch {
  float *given, *values, *grad, *turned;
  float *codes, *grad_codes;  // [column][width]
  float *by_width, *by_row;   // the gradient of a block's embedding, [width][row] and [row][width]

  BackwardScratch(float* start, int64_t width, int64_t pitch) {
    given = start, values = given + TILE_FLOATS, grad = values + TILE_FLOATS, turned = grad + TILE_FLOATS;
    codes = turned + TILE_FLOATS, grad_codes = codes + TILE_COLUMNS * width;
    by_width = grad_codes + TILE_COLUMNS * width, by_row = by_width + pitch * width;
  }
  static int64_t floats(int64_t width, int64_t pitch) {
    return 4 * TILE_FLOATS + 2 * (TILE_COLUMNS + pitch) * width;
  }
};

void load_grad_embedding(const GumbelCodebookBackward& p, const RowBlock& block, int64_t width, int64_t pitch,
                         const BackwardScratch& scratch) {
  memset(scratch.by_width, 0, width * pitch * sizeof(float));
  for (int64_t t = 0; t < tiles_of(p.codebook.width); ++t) {
    const Tile tile(t, p.codebook.width, pitch);
    load_tile(p.codebook.dtype, block, tile, 0.0f, scratch.turned, scratch.by_width + tile.first * pitch);
  }
}

// The gradient of the sample: the codebook times the gradient of the embedding.
void multiply_sample_gradient(const Tile& tile, const Codebook& codebook, int64_t width, const BackwardScratch& s) {
  memset(s.grad, 0, tile.padded() * tile.pitch * sizeof(float));
  multiply({s.codes, width, 1, s.by_width, tile.pitch, s.grad, tile.pitch}, tile.columns, codebook.width, tile.pitch);
}

BlockNumbers numbers_of_block(const GumbelCodebookBackward& p, const Call& call, int64_t width, int64_t block,
                              const BackwardScratch& scratch) {
  const int64_t first = call.blocks.first(block), rows = call.blocks.rows_of(block), pitch = call.blocks.pitch;
  const RowBlock logits(p.logits, first, rows);
  const BlockNoise noise = call.noise(block);
  RunningSoftmax softmax(noise, call.factor, pitch);
  Posterior<> posterior(pitch);
  RowSums<MOST_ROWS> dot(pitch);
  load_grad_embedding(p, RowBlock(p.grad_embedding, first, rows), width, pitch, scratch);
  for (int64_t t = 0; t < tiles_of(p.columns); ++t) {
    const Tile tile(t, p.columns, pitch);
    float shrink[MOST_ROWS];
    load_tile(p.dtype, logits, tile, -INFINITY_FLOAT, scratch.turned, scratch.given);
    load_codes(p.codebook, tile, width, scratch.codes);
    softmax.draw(tile, scratch.given, scratch.values, shrink);
    multiply_sample_gradient(tile, p.codebook, width, scratch);
    for (int64_t r = 0; r < pitch; ++r) dot.sum[r] *= shrink[r];
    add_tile(tile, Columns<float>{scratch.given, pitch}, Columns<float>{scratch.values, pitch},
             Columns<float>{scratch.grad, pitch}, dot, &posterior);
  }
  for (int64_t r = 0; r < pitch; ++r) dot.sum[r] /= softmax.sum[r];
  BlockNumbers numbers{{}, {}, SampleGradient<>(dot, call.tau, pitch),
                       PosteriorGradient<>(posterior, p.grad_kl, first, rows, pitch)};
  for (int64_t r = 0; r < pitch; ++r) {
    numbers.largest[r] = softmax.largest[r];
    numbers.inverse_sum[r] = static_cast<float>(1.0 / softmax.sum[r]);
  }
  return numbers;
}

void backward_tile(const GumbelCodebookBackward& p, const Call& call, int64_t width, const BlockNumbers* numbers,
                   int64_t index, const BackwardScratch& s) {
  const int64_t pitch = call.blocks.pitch;
  const Tile tile(index, p.columns, pitch);
  load_codes(p.codebook, tile, width, s.codes);
  memset(s.grad_codes, 0, TILE_COLUMNS * width * sizeof(float));
  for (int64_t block = 0; block < call.blocks.count; ++block) {
    const int64_t first = call.blocks.first(block), rows = call.blocks.rows_of(block);
    const BlockNumbers& own = numbers[block];
    load_grad_embedding(p, RowBlock(p.grad_embedding, first, rows), width, pitch, s);
    load_tile(p.dtype, RowBlock(p.logits, first, rows), tile, -INFINITY_FLOAT, s.turned, s.given);
    draw_tile(call.noise(block), tile, call.factor, s.given, own.largest, s.values);
    scale_tile(tile, s.values, own.inverse_sum, s.values);
    multiply_sample_gradient(tile, p.codebook, width, s);
    gradient_tile(tile, Columns<float>{s.given, pitch}, Columns<float>{s.values, pitch}, Columns<float>{s.grad, pitch},
                  own.sample, &own.posterior, s.grad);
    store_tile(p.dtype, RowBlock(p.grad_logits, first, rows), tile, false, s.grad, s.turned);
    for (int64_t d = 0; d < width; d += 8) {
      for (int64_t r = 0; r < pitch; r += 8) {
        transpose_8x8(s.by_width + d * pitch + r, pitch, s.by_row + r * width + d, width);
      }
    }
    multiply({s.values, pitch, 1, s.by_row, width, s.grad_codes, width}, tile.columns, rows, width);
  }
  store_codes(p.grad_codebook, tile, s.grad_codes, width);
}

}  // namespace

const char* gumbel_codebook(const GumbelCodebook& given) {
  GumbelCodebook p = given;
  p.logits = merged(p.logits);
  p.embedding = merged(p.embedding);
  const int64_t width = round_up(p.codebook.width, PANEL);
  const Call call(p.noise, Blocks(p.logits, p.columns, 0, 1, LEAST_PRODUCT_ROWS, p.threads));
  const Scratch scratch(p.threads, forward_floats(width, call.blocks.pitch));
  if (scratch.failed()) return OUT_OF_MEMORY;
  parallel_items(call.blocks.count, p.threads,
                 [&](int64_t block, int thread) { forward_block(p, call, width, block, scratch.of(thread)); });
  return nullptr;
}

const char* gumbel_codebook_backward(const GumbelCodebookBackward& given) {
  GumbelCodebookBackward p = given;
  RowTensor* const tensors[] = {&p.grad_embedding, &p.grad_kl, &p.logits, &p.grad_logits};
  for (RowTensor* tensor : tensors) *tensor = merged(*tensor);
  const int64_t width = round_up(p.codebook.width, PANEL);
  // Not the number of threads: the codebook's gradient is summed block by block.
  constexpr int BLOCKS_WANTED = 4;
  const Call call(p.noise, Blocks(p.logits, p.columns, 0, 1, LEAST_PRODUCT_ROWS, BLOCKS_WANTED));
  const int64_t pitch = call.blocks.pitch;
  const Scratch scratch(p.threads, BackwardScratch::floats(width, pitch));
  const Scratch kept(1, call.blocks.count * static_cast<int64_t>(sizeof(BlockNumbers) / sizeof(float)));
  if (scratch.failed() || kept.failed()) return OUT_OF_MEMORY;
  BlockNumbers* numbers = reinterpret_cast<BlockNumbers*>(kept.of(0));
  parallel_items(call.blocks.count, p.threads, [&](int64_t block, int thread) {
    numbers[block] = numbers_of_block(p, call, width, block, BackwardScratch(scratch.of(thread), width, pitch));
  });
  parallel_items(tiles_of(p.columns), p.threads, [&](int64_t tile, int thread) {
    backward_tile(p, call, width, numbers, tile, BackwardScratch(scratch.of(thread), width, pitch));
  });
  return nullptr;
}

}  // namespace dalle::DALLE_ISA_NAMESPACE
