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
      if (!soft.keeps(tile)) load_tile(p.dtype, logits, tile, -INFINITY_FLOAT, turned, given);
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
                        3 * TILE_FLOATS + (HARD ? 0 : SoftSample::scratch_floats(p.columns, call.blocks.pitch)));
  if (scratch.failed()) return OUT_OF_MEMORY;
  expect_writes(call, p.dtype, p.y);
  parallel_items(call.blocks.count, p.threads,
                 [&](int64_t block, int thread) { forward_block<HARD>(p, call, block, scratch.of(thread)); });
  return nullptr;
}

// ---- Backward: y (grad_y - sum grad_y y) / tau, and for the KL grad_kl q (ln q - sum q ln q)

// A block's part in the sweeps of its band.
template <bool HARD>
class BackwardBlock {
 public:
  BackwardBlock(const GumbelSoftmaxBackward& p, float* scratch, const Call& call, const BlockRows& at)
      : p_(p),
        call_(call),
        at_(at),
        given_(scratch),
        values_(given_ + TILE_FLOATS),
        grad_(values_ + TILE_FLOATS),
        turned_(grad_ + TILE_FLOATS),
        logits_(p.logits, at),
        y_(p.y, at),
        grad_y_(p.grad_y, at),
        grad_logits_(p.grad_logits, at),
        noise_(call.noise_from(at.first)),
        soft_(noise_, call.factor, p.columns, call.blocks.pitch, turned_ + TILE_FLOATS),
        posterior_(call.blocks.pitch) {}

  // Only where the sample is hard.
  void draw(const Tile& tile) {
    load_logits(tile);
    soft_.draw(tile, given_, values_);
  }

  void add(const Tile& tile) {
    load_sample_and_gradient(tile);
    dot_tile(tile, values_, grad_, dot_);
    if (p_.grad_kl.data != nullptr) load_logits(tile), posterior_.add(tile, given_);
  }

  // All tiles are added.
  void finish() {
    sample_gradient_.emplace(dot_, call_.tau, call_.blocks.pitch);
    posterior_gradient_.emplace(posterior_, p_.grad_kl, at_.first, at_.count, call_.blocks.pitch);
  }

  void write_gradient(const Tile& tile) {
    load_sample_and_gradient(tile);
    sample_gradient_->set(tile, values_, grad_);
    if (p_.grad_kl.data != nullptr) load_logits(tile), posterior_gradient_->add(tile, given_, grad_);
    store_tile(p_.dtype, grad_logits_, tile, call_.stream, grad_, turned_);
  }

 private:
  void load_logits(const Tile& tile) { load_tile(p_.dtype, logits_, tile, -INFINITY_FLOAT, turned_, given_); }

  void load_sample_and_gradient(const Tile& tile) {
    load_tile(p_.dtype, grad_y_, tile, 0.0f, turned_, grad_);
    if constexpr (HARD) {
      if (!soft_.keeps(tile)) load_logits(tile);
      soft_.sample(tile, given_, values_);
      for (int64_t i = tile.columns * tile.pitch; i < tile.padded() * tile.pitch; ++i) values_[i] = 0.0f;
    } else {
      load_tile(p_.dtype, y_, tile, 0.0f, turned_, values_);
    }
  }

  const GumbelSoftmaxBackward& p_;
  const Call& call_;
  BlockRows at_;
  float *given_, *values_, *grad_, *turned_;
  RowBlock logits_, y_, grad_y_, grad_logits_;
  BlockNoise noise_;
  SoftSample soft_;
  Posterior posterior_;
  double dot_[MOST_ROWS] = {};
  std::optional<SampleGradient> sample_gradient_;
  std::optional<PosteriorGradient> posterior_gradient_;
};

template <bool HARD>
const char* backward(const GumbelSoftmaxBackward& p) {
  // Bands are too long for any cache; what a hard sample keeps is a third of what its sweeps share.
  const bool bands = !HARD && p.grad_logits.column_stride != 1;
  Blocks blocks = blocks_of(p.grad_logits, p.columns, bands ? 0 : p.columns * 12, 3 << 20, p.threads);
  if (bands) blocks.form_bands(p.threads);
  const Call call(p.noise, blocks);
  const Scratch scratch(p.threads,
                        4 * TILE_FLOATS + (HARD ? SoftSample::scratch_floats(p.columns, call.blocks.pitch) : 0));
  if (scratch.failed()) return OUT_OF_MEMORY;
  expect_writes(call, p.dtype, p.grad_logits);
  parallel_items(call.blocks.bands(), p.threads, [&](int64_t index, int thread) {
    using Block = BackwardBlock<HARD>;
    Band<Block> band(call, index, p, scratch.of(thread));
    if (HARD) band.sweep([](Block& block, const Tile& tile) { block.draw(tile); });
    band.sweep([](Block& block, const Tile& tile) { block.add(tile); });
    band.each([](Block& block) { block.finish(); });
    band.sweep([](Block& block, const Tile& tile) { block.write_gradient(tile); });
  });
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
