// Gumbel-softmax on the CPU: block after block of rows, each swept twice, tile by tile.
#include "gumbel_softmax/gumbel_softmax.h"

#include <algorithm>
#include <optional>

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
  Posterior<> posterior(pitch);
  for (int64_t t = 0; t < tiles_of(p.columns); ++t) {
    const Tile tile(t, p.columns, pitch);
    load_tile(p.dtype, logits, tile, -INFINITY_FLOAT, turned, given);
    if constexpr (HARD) {
      hard.draw(tile, given, values);
    } else {
      soft.draw(tile, given, values);
    }
    if (p.kl != nullptr) posterior.add(tile, Columns<float>{given, pitch});
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

// A block and its sweeps.
template <bool HARD>
class BackwardBlock {
 public:
  BackwardBlock(const GumbelSoftmaxBackward& p, const Call& call, int64_t block, float* scratch)
      : p_(p),
        call_(call),
        first_(call.blocks.first(block)),
        rows_(call.blocks.rows_of(block)),
        given_(scratch),
        values_(given_ + WIDE_TILE_FLOATS),
        grad_(values_ + WIDE_TILE_FLOATS),
        turned_(grad_ + WIDE_TILE_FLOATS),
        logits_(p.logits, first_, rows_),
        y_(p.y, first_, rows_),
        grad_y_(p.grad_y, first_, rows_),
        grad_logits_(p.grad_logits, first_, rows_),
        dot_(call.blocks.pitch) {
    if (p.grad_kl.data != nullptr) posterior_.emplace(call.blocks.pitch);
    if constexpr (HARD) {
      noise_.emplace(call.noise(block));
      soft_.emplace(*noise_, call.factor, p.columns, call.blocks.pitch, turned_ + WIDE_TILE_FLOATS);
    }
  }

  void run() {
    if constexpr (HARD) {
      each_tile([&](const Tile& tile) {
        load_logits(tile);
        soft_->draw(tile, given_, values_);
      });
    }
    Posterior<WIDE_ROWS>* const posterior = posterior_ ? &*posterior_ : nullptr;
    each_tile([&](const Tile& tile) {
      read(tile, [&](const auto& logits, const auto& y, const auto& grad_y) {
        add_tile(tile, logits, y, grad_y, dot_, posterior);
      });
    });
    write();
  }

 private:
  template <class Visit>
  void each_tile(const Visit& visit) {
    for (int64_t t = 0; t < call_.blocks.tiles(); ++t) visit(call_.blocks.tile(t));
  }

  // All tiles are added.
  void write() {
    const int64_t pitch = call_.blocks.pitch;
    const SampleGradient<WIDE_ROWS> sample(dot_, call_.tau, pitch);
    std::optional<PosteriorGradient<WIDE_ROWS>> of_kl;
    if (posterior_) of_kl.emplace(*posterior_, p_.grad_kl, first_, rows_, pitch);
    each_tile([&](const Tile& tile) {
      read(tile, [&](const auto& logits, const auto& y, const auto& grad_y) {
        gradient_tile(tile, logits, y, grad_y, sample, of_kl ? &*of_kl : nullptr, grad_);
      });
      store_tile(p_.dtype, grad_logits_, tile, call_.stream, grad_, turned_);
    });
  }

  void load_logits(const Tile& tile) { load_tile(p_.dtype, logits_, tile, -INFINITY_FLOAT, turned_, given_); }

  // Calls use(logits, y, grad_y) with the columns of a tile, where they lie or as copies.
  template <class Use>
  void read(const Tile& tile, const Use& use) {
    if constexpr (HARD) {
      if (posterior_ || !soft_->keeps(tile)) load_logits(tile);
      soft_->sample(tile, given_, values_);
      for (int64_t i = tile.columns * tile.pitch; i < tile.padded() * tile.pitch; ++i) values_[i] = 0.0f;
    } else {
      if (logits_.has_columns(tile) && y_.has_columns(tile) && grad_y_.has_columns(tile)) {
        if (p_.dtype == Dtype::float32) return use_columns<float>(tile, use);
        if (p_.dtype == Dtype::float16) return use_columns<Half>(tile, use);
        return use_columns<BFloat16>(tile, use);
      }
      if (posterior_) load_logits(tile);
      load_tile(p_.dtype, y_, tile, 0.0f, turned_, values_);
    }
    load_tile(p_.dtype, grad_y_, tile, 0.0f, turned_, grad_);
    use(Columns<float>{given_, tile.pitch}, Columns<float>{values_, tile.pitch}, Columns<float>{grad_, tile.pitch});
  }

  template <class T, class Use>
  void use_columns(const Tile& tile, const Use& use) const {
    use(logits_.columns<T>(tile), y_.columns<T>(tile), grad_y_.columns<T>(tile));
  }

  const GumbelSoftmaxBackward& p_;
  const Call& call_;
  int64_t first_, rows_;
  float *given_, *values_, *grad_, *turned_;
  RowBlock logits_, y_, grad_y_, grad_logits_;
  std::optional<BlockNoise> noise_;  // these two only where the sample is hard
  std::optional<SoftSample> soft_;
  RowSums<WIDE_ROWS> dot_;
  std::optional<Posterior<WIDE_ROWS>> posterior_;  // only with the KL
};

template <bool HARD>
const char* backward(const GumbelSoftmaxBackward& p) {
  // What a hard sample keeps is a third of what its sweeps share. Those of a soft one share nothing where they go
  // straight through the columns, which are longer than any cache.
  const int64_t run = std::min({run_of(p.logits), run_of(p.y), run_of(p.grad_y), run_of(p.grad_logits)});
  const bool straight = !HARD && p.grad_logits.column_stride != 1;
  Blocks blocks = blocks_of(p.grad_logits, p.columns, straight ? 0 : p.columns * 12, 3 << 20, p.threads);
  if (straight) blocks.widen(run, p.threads);
  const Call call(p.noise, blocks);
  const Scratch scratch(p.threads,
                        4 * WIDE_TILE_FLOATS + (HARD ? SoftSample::scratch_floats(p.columns, call.blocks.pitch) : 0));
  if (scratch.failed()) return OUT_OF_MEMORY;
  expect_writes(call, p.dtype, p.grad_logits);
  parallel_items(call.blocks.count, p.threads, [&](int64_t block, int thread) {
    BackwardBlock<HARD>(p, call, block, scratch.of(thread)).run();
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
