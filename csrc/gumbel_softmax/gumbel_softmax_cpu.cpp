// Gumbel-softmax on the CPU: block after block of rows, each swept twice, tile by tile.
#include "gumbel_softmax/gumbel_softmax.h"

#include "common/huge_pages.h"
#include "common/parallel.h"
#include "gumbel_softmax/sample.h"

namespace dalle::DALLE_ISA_NAMESPACE {
namespace {

// Blocks of rows for sweeps that share `row_bytes` a row: in the second-level cache; but where a column of a block is
// one run in memory, longer runs (and fewer pages) pay for going into the third, as far as `third_level` bytes of it.
Blocks blocks_of(const RowTensor& output, int64_t columns, int64_t row_bytes, int64_t third_level, int threads) {
  constexpr int64_t SECOND_LEVEL = 256 << 10;
  return Blocks(output, columns, row_bytes, output.column_stride == 1 ? SECOND_LEVEL : third_level, LEAST_ROWS,
                threads);
}

// `output` is contiguous.
void expect_writes(const Call& call, Dtype dtype, const RowTensor& output) {
  const int64_t bytes = call.blocks.rows * call.blocks.columns * (dtype == Dtype::float32 ? 4 : 2);
  if (call.stream) prefer_huge_pages(output.data, bytes);
}

// ---- Forward

template <bool HARD>
void forward_block(const GumbelSoftmax& p, const Call& call, int64_t block, float* scratch) {
  const int64_t first = call.blocks.first(block), rows = call.blocks.rows_of(block), pitch = call.blocks.pitch;
  const RowBlock logits(p.logits, first, rows), y(p.y, first, rows);
  float *given = scratch, *values = given + TILE_FLOATS, *turned = values + TILE_FLOATS;
  const BlockNoise noise = call.noise(block);
  SoftSample soft(noise, call.factor, p.columns, pitch, turned + TILE_FLOATS);
  HardSample hard(noise, pitch);
  Posterior posterior(pitch);
  for (int64_t t = 0; t < tiles_of(p.columns); ++t) {
    const Tile tile(t, p.columns, pitch);
    load_tile(p.dtype, logits, tile, -INFINITY_FLOAT, turned, given);
    if constexpr (HARD) {
      hard.draw(tile, given, values);
    } else {
      soft.draw(tile, given, values);
    }
    if (p.kl != nullptr) posterior.add(tile, given);
  }
  for (int64_t t = 0; t < tiles_of(p.columns); ++t) {
    const Tile tile(t, p.columns, pitch);
    if constexpr (HARD) {
      hard.sample(tile, values);
    } else {
      if (!SoftSample::keeps(p.columns)) load_tile(p.dtype, logits, tile, -INFINITY_FLOAT, turned, given);
      soft.sample(tile, given, values);
    }
    store_tile(p.dtype, y, tile, call.stream, values, turned);
  }
  if (p.kl == nullptr) return;
  for (int64_t r = 0; r < rows; ++r) p.kl[first + r] = posterior.kl(r, p.columns);
}

template <bool HARD>
const char* forward(const GumbelSoftmax& p) {
  const int64_t row_bytes = HARD ? 0 : p.columns * 4;
  const Call call(p.noise, blocks_of(p.y, p.columns, row_bytes, 1 << 20, p.threads));
  const Scratch scratch(p.threads,
                        3 * TILE_FLOATS + (HARD ? 0 : SoftSample::kept_floats(p.columns, call.blocks.pitch)));
  if (scratch.failed()) return OUT_OF_MEMORY;
  expect_writes(call, p.dtype, p.y);
  parallel_items(call.blocks.count, p.threads,
                 [&](int64_t block, int thread) { forward_block<HARD>(p, call, block, scratch.of(thread)); });
  return nullptr;
}

// ---- Backward: y (grad_y - sum grad_y y) / tau, and for the KL grad_kl q (ln q - sum q ln q)

template <bool HARD>
void backward_block(const GumbelSoftmaxBackward& p, const Call& call, int64_t block, float* scratch) {
  const int64_t first = call.blocks.first(block), rows = call.blocks.rows_of(block), pitch = call.blocks.pitch;
  const bool with_kl = p.grad_kl.data != nullptr;
  const RowBlock logits(p.logits, first, rows), y(p.y, first, rows), grad_y(p.grad_y, first, rows);
  const RowBlock grad_logits(p.grad_logits, first, rows);
  float *given = scratch, *values = given + TILE_FLOATS, *grad = values + TILE_FLOATS, *turned = grad + TILE_FLOATS;
  const BlockNoise noise = call.noise(block);
  SoftSample soft(noise, call.factor, p.columns, pitch, turned + TILE_FLOATS);
  Posterior posterior(pitch);
  double dot[MOST_ROWS] = {};
  const auto load_logits = [&](const Tile& tile) {
    load_tile(p.dtype, logits, tile, -INFINITY_FLOAT, turned, given);
  };
  const auto load_sample_and_gradient = [&](const Tile& tile) {
    load_tile(p.dtype, grad_y, tile, 0.0f, turned, grad);
    if constexpr (HARD) {
      if (!SoftSample::keeps(p.columns)) load_logits(tile);
      soft.sample(tile, given, values);
      for (int64_t i = tile.columns * pitch; i < tile.padded() * pitch; ++i) values[i] = 0.0f;
    } else {
      load_tile(p.dtype, y, tile, 0.0f, turned, values);
    }
  };
  for (int64_t t = 0; HARD && t < tiles_of(p.columns); ++t) {
    const Tile tile(t, p.columns, pitch);
    load_logits(tile);
    soft.draw(tile, given, values);
  }
  for (int64_t t = 0; t < tiles_of(p.columns); ++t) {
    const Tile tile(t, p.columns, pitch);
    load_sample_and_gradient(tile);
    dot_tile(tile, values, grad, dot);
    if (with_kl) load_logits(tile), posterior.add(tile, given);
  }
  const PosteriorGradient posterior_gradient(posterior, p.grad_kl, first, rows, pitch);
  const SampleGradient sample_gradient(dot, call.tau, pitch);
  for (int64_t t = 0; t < tiles_of(p.columns); ++t) {
    const Tile tile(t, p.columns, pitch);
    load_sample_and_gradient(tile);
    sample_gradient.set(tile, values, grad);
    if (with_kl) load_logits(tile), posterior_gradient.add(tile, given, grad);
    store_tile(p.dtype, grad_logits, tile, call.stream, grad, turned);
  }
}

template <bool HARD>
const char* backward(const GumbelSoftmaxBackward& p) {
  const Call call(p.noise, blocks_of(p.grad_logits, p.columns, p.columns * 12, 8 << 20, p.threads));
  const Scratch scratch(p.threads,
                        4 * TILE_FLOATS + (HARD ? SoftSample::kept_floats(p.columns, call.blocks.pitch) : 0));
  if (scratch.failed()) return OUT_OF_MEMORY;
  expect_writes(call, p.dtype, p.grad_logits);
  parallel_items(call.blocks.count, p.threads,
                 [&](int64_t block, int thread) { backward_block<HARD>(p, call, block, scratch.of(thread)); });
  return nullptr;
}

}  // namespace

const char* gumbel_softmax(const GumbelSoftmax& given) {
  GumbelSoftmax p = given;
  p.logits = merged(p.logits);
  p.y = merged(p.y);
  return p.hard ? forward<true>(p) : forward<false>(p);
}

const char* gumbel_softmax_backward(const GumbelSoftmaxBackward& given) {
  GumbelSoftmaxBackward p = given;
  RowTensor* const tensors[] = {&p.logits, &p.y, &p.grad_y, &p.grad_kl, &p.grad_logits};
  for (RowTensor* tensor : tensors) *tensor = merged(*tensor);
  return p.hard ? backward<true>(p) : backward<false>(p);
}

}  // namespace dalle::DALLE_ISA_NAMESPACE
