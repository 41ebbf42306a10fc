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

using Keep = SoftSample::Keep;

// Blocks that go through their columns side by side. A column of [batch, columns, height, width] can lie a page or more
// from the next: to look up the page takes longer than to read a block's 256 bytes of it.
constexpr int64_t MOST_SIDE_BY_SIDE = 4;

// Scratch for a tile each.
struct Buffers {
  float *given, *values, *turned;
  explicit Buffers(float* start) : given(start), values(given + TILE_FLOATS), turned(values + TILE_FLOATS) {}
  static constexpr int64_t FLOATS = 3 * TILE_FLOATS;
};

// A block: `draw` every tile in order, then `write` every tile. With Keep::none a soft sample's exponentials wait in y
// for the sum of their row.
template <bool HARD>
class ForwardBlock {
 public:
  ForwardBlock(const GumbelSoftmax& p, const Call& call, int64_t block, Keep keep, float* scratch)
      : p_(p),
        call_(call),
        first_(call.blocks.first(block)),
        rows_(call.blocks.rows_of(block)),
        keep_(keep),
        logits_(p.logits, first_, rows_),
        y_(p.y, first_, rows_),
        noise_(call.noise(block)),
        hard_(noise_, call.blocks.pitch),
        soft_(noise_, call.factor, p.columns, call.blocks.pitch, keep, scratch),
        posterior_(call.blocks.pitch) {}

  void draw(const Tile& tile, const Buffers& buffers) {
    load_logits(tile, buffers);
    if constexpr (HARD) {
      hard_.draw(tile, buffers.given, buffers.values);
    } else {
      soft_.draw(tile, buffers.given, buffers.values);
      if (keep_ == Keep::none) store_tile(p_.dtype, y_, tile, call_.stream, buffers.values, buffers.turned);
    }
    if (p_.kl != nullptr) posterior_.add(tile, Columns<float>{buffers.given, tile.pitch});
  }

  void write(const Tile& tile, const Buffers& buffers) {
    bool stream = call_.stream;
    if constexpr (HARD) {
      hard_.sample(tile, buffers.values);
    } else if (keep_ == Keep::none) {
      load_tile(p_.dtype, y_, tile, 0.0f, buffers.turned, buffers.values);
      soft_.normalize(tile, buffers.values, buffers.values);
      stream = false;  // what was just read is in the caches
    } else {
      if (!soft_.keeps(tile)) load_logits(tile, buffers);
      soft_.sample(tile, buffers.given, buffers.values);
    }
    store_tile(p_.dtype, y_, tile, stream, buffers.values, buffers.turned);
  }

  void write_kl() const {
    for (int64_t r = 0; p_.kl != nullptr && r < rows_; ++r) p_.kl[first_ + r] = posterior_.kl(r, p_.columns);
  }

 private:
  void load_logits(const Tile& tile, const Buffers& buffers) const {
    load_tile(p_.dtype, logits_, tile, -INFINITY_FLOAT, buffers.turned, buffers.given);
  }

  const GumbelSoftmax& p_;
  const Call& call_;
  int64_t first_, rows_;
  Keep keep_;
  RowBlock logits_, y_;
  BlockNoise noise_;
  HardSample hard_;
  SoftSample soft_;
  Posterior<> posterior_;
};

// Up to MOST_SIDE_BY_SIDE blocks, from number `begin` on.
template <bool HARD>
class ForwardBlocks {
 public:
  ForwardBlocks(const GumbelSoftmax& p, const Call& call, int64_t begin, int64_t end, Keep keep, float* scratch,
                int64_t scratch_floats)
      : count_(end - begin) {
    for (int64_t b = 0; b < count_; ++b) blocks_[b].emplace(p, call, begin + b, keep, scratch + b * scratch_floats);
  }

  void draw(const Tile& tile, const Buffers& buffers) {
    for (int64_t b = 0; b < count_; ++b) blocks_[b]->draw(tile, buffers);
  }
  void write(const Tile& tile, const Buffers& buffers) {
    for (int64_t b = 0; b < count_; ++b) blocks_[b]->write(tile, buffers);
  }
  void write_kl() const {
    for (int64_t b = 0; b < count_; ++b) blocks_[b]->write_kl();
  }

 private:
  int64_t count_;
  std::optional<ForwardBlock<HARD>> blocks_[MOST_SIDE_BY_SIDE];
};

template <bool HARD>
class Forward {
 public:
  explicit Forward(const GumbelSoftmax& p)
      : p_(p),
        keep_(has_room_in_y(p) ? Keep::none : Keep::tiles),
        call_(p.noise, blocks_of(p.y, p.columns, HARD || keep_ == Keep::none ? 0 : p.columns * 4, 1 << 20, p.threads)),
        block_floats_(HARD ? 0 : SoftSample::scratch_floats(p.columns, call_.blocks.pitch, keep_)),
        side_by_side_(keep_ == Keep::none ? most_side_by_side() : 1) {}

  const char* run() const {
    const int64_t groups = (call_.blocks.count + side_by_side_ - 1) / side_by_side_;
    const Scratch scratch(p_.threads, Buffers::FLOATS + (keep_ == Keep::none ? 2 : 1) * group_floats());
    if (scratch.failed()) return OUT_OF_MEMORY;
    expect_writes(call_, p_.dtype, p_.y);
    parallel_pull(groups, p_.threads, [&](const auto& next, int thread) { run_thread(next, scratch.of(thread)); });
    return nullptr;
  }

 private:
  // For the exponentials of a soft sample, and of more rows than the caches have room for. Only where columns are long
  // runs does that pay for writing y twice.
  static bool has_room_in_y(const GumbelSoftmax& p) {
    const bool long_runs = p.y.column_stride != 1 && std::min(run_of(p.logits), run_of(p.y)) >= 2 * MOST_ROWS;
    return !HARD && p.dtype == Dtype::float32 && long_runs;
  }

  // So many that there are two groups a thread, and that the maxima of two groups take no more than exponentials would.
  int64_t most_side_by_side() const {
    const int64_t fitting = SoftSample::MOST_KEPT_FLOATS / (2 * block_floats_);
    const int64_t blocks = std::min(call_.blocks.count / (2 * p_.threads), fitting);
    return blocks < 1 ? 1 : std::min(blocks, MOST_SIDE_BY_SIDE);
  }
  int64_t group_floats() const { return side_by_side_ * block_floats_; }

  // Where y keeps the exponentials, a group is written while the next one is drawn: the one waits for memory, the other
  // for arithmetic.
  template <class Next>
  void run_thread(const Next& next, float* scratch) const {
    const Buffers buffers(scratch);
    std::optional<ForwardBlocks<HARD>> groups[2];
    for (int turn = 0;; turn = keep_ == Keep::none ? 1 - turn : 0) {
      auto &drawn = groups[turn], &before = groups[1 - turn];
      const int64_t begin = next() * side_by_side_;
      if (begin >= 0) {
        drawn.emplace(p_, call_, begin, std::min(begin + side_by_side_, call_.blocks.count), keep_,
                      scratch + Buffers::FLOATS + turn * group_floats(), block_floats_);
      } else if (!before) {
        return;
      }
      each_tile([&](const Tile& tile) {
        if (drawn) drawn->draw(tile, buffers);
        if (before) before->write(tile, buffers);
      });
      auto& written = keep_ == Keep::none ? before : drawn;
      if (keep_ == Keep::tiles) each_tile([&](const Tile& tile) { written->write(tile, buffers); });
      if (written) written->write_kl();
      written.reset();
    }
  }

  template <class Visit>
  void each_tile(const Visit& visit) const {
    for (int64_t t = 0; t < tiles_of(p_.columns); ++t) visit(Tile(t, p_.columns, call_.blocks.pitch));
  }

  const GumbelSoftmax& p_;
  Keep keep_;
  Call call_;
  int64_t block_floats_;  // of scratch space
  int64_t side_by_side_;
};

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
      soft_.emplace(*noise_, call.factor, p.columns, call.blocks.pitch, Keep::tiles, turned_ + WIDE_TILE_FLOATS);
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
  const int64_t soft_floats = HARD ? SoftSample::scratch_floats(p.columns, call.blocks.pitch, Keep::tiles) : 0;
  const Scratch scratch(p.threads, 4 * WIDE_TILE_FLOATS + soft_floats);
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
  return p.hard ? Forward<true>(p).run() : Forward<false>(p).run();
}

const char* gumbel_softmax_backward(const GumbelSoftmaxBackward& given) {
  GumbelSoftmaxBackward p = given;
  RowTensor* const tensors[] = {&p.logits, &p.y, &p.grad_y, &p.grad_kl, &p.grad_logits};
  for (RowTensor* tensor : tensors) *tensor = merged(*tensor);
  return p.hard ? backward<true>(p) : backward<false>(p);
}

}  // namespace dalle::DALLE_ISA_NAMESPACE
