// What the kernels compute on a tile: the noise, noisy scores, their softmax tile by tile, and the posterior's KL.
//
// A row's maximum and sum run along with its tiles: a new maximum shrinks the sum so far. NaN and +inf make the sum
// NaN, and a row of -inf leaves it 0, so that everything divided by it is NaN, as it should be.
#pragma once

#include "common/philox.h"
#include "gumbel_softmax/rows.h"

namespace dalle::DALLE_ISA_NAMESPACE {

constexpr float LOWEST = -3.40282347e38f;
constexpr double LOG2_E = 1.4426950408889634;
constexpr int64_t MOST_VECTORS = MOST_ROWS / Vector::width;

// The noise of a block's rows.
struct BlockNoise {
  const PhiloxKey& key;
  PhiloxRows rows[MOST_VECTORS];

  BlockNoise(const PhiloxKey& key_, uint64_t first_row, int64_t pitch) : key(key_) {
    for (int64_t r = 0; r < pitch; r += Vector::width) {
      rows[r / Vector::width] = PhiloxRows(key, first_row + static_cast<uint64_t>(r));
    }
  }
};

// What is common to the blocks of a call.
struct Call {
  PhiloxKey key;
  uint64_t offset;
  float tau;
  Factor factor;
  Blocks blocks;
  bool stream;

  Call(const GumbelNoise& noise, const Blocks& blocks_)
      : key(static_cast<uint64_t>(*noise.seed)),
        offset(static_cast<uint64_t>(*noise.offset)),
        tau(*noise.tau),
        factor(LOG2_E / static_cast<double>(tau)),
        blocks(blocks_),
        stream(blocks.rows * blocks.columns * 4 >= STREAMED_BYTES) {}

  BlockNoise noise(int64_t block) const {
    return BlockNoise(key, offset + static_cast<uint64_t>(blocks.first(block)), blocks.pitch);
  }
};

// complement_uniform of the tile. Apart from what is done with it, since each of the two loops by itself keeps the
// processor busy, and together they are too long for it to look ahead.
template <int COUNT>
DALLE_INLINE void uniform_vectors(const BlockNoise& noise, const PhiloxColumns& group, const Tile& tile, int64_t r,
                                  float* v) {
  IntegerVector words[COUNT][PHILOX_WORDS];
  complement_words<COUNT>(noise.key, noise.rows + r / Vector::width, group, words);
  for (int i = 0; i < COUNT; ++i) {
    for (int64_t j = 0; j < PHILOX_WORDS; ++j) {
      store(v + j * tile.pitch + r + i * Vector::width, complement_uniform(words[i][j]));
    }
  }
}

DALLE_NOINLINE inline void uniform_tile(const BlockNoise& noise, const Tile& tile, float* v) {
  for (int64_t c = 0; c < tile.columns; c += PHILOX_WORDS) {
    const PhiloxColumns group(noise.key, static_cast<uint32_t>((tile.first + c) / PHILOX_WORDS));
    float* const columns = v + c * tile.pitch;
    int64_t r = 0;
    for (; r + 2 * Vector::width <= tile.pitch; r += 2 * Vector::width) {
      uniform_vectors<2>(noise, group, tile, r, columns);
    }
    for (; r < tile.pitch; r += Vector::width) uniform_vectors<1>(noise, group, tile, r, columns);
  }
}

// Four columns of a row of vectors.
DALLE_INLINE Four load_four(const Tile& tile, const float* p) {
  return {{load(p), load(p + tile.pitch), load(p + 2 * tile.pitch), load(p + 3 * tile.pitch)}};
}
DALLE_INLINE void store_four(const Tile& tile, float* p, const Four& x) {
  for (int i = 0; i < 4; ++i) store(p + i * tile.pitch, x.v[i]);
}

// scores = logits + noise; largest[row] grows to the largest of them. Four columns make a step.
DALLE_NOINLINE inline void score_tile(const BlockNoise& noise, const Tile& tile, const float* logits, float* scores,
                                      float* largest) {
  uniform_tile(noise, tile, scores);
  for (int64_t r = 0; r < tile.pitch; r += Vector::width) {
    Four most = four(load(largest + r));
    for (int64_t i = r; i < tile.padded() * tile.pitch; i += 4 * tile.pitch) {
      const Four score = load_four(tile, logits + i) + gumbel(load_four(tile, scores + i));
      store_four(tile, scores + i, score);
      most = maximum(most, score);
    }
    store(largest + r, largest_of(most));
  }
}

// values becomes exp(values - largest), with the factor's scale, and sum[row] its sum over the tile.
DALLE_NOINLINE inline void exponential_tile(const Tile& tile, const Factor& factor, const float* largest, float* values,
                                            float* sum) {
  for (int64_t r = 0; r < tile.pitch; r += Vector::width) {
    const Four most = four(load(largest + r));
    Four total = four(broadcast(0.0f));
    for (int64_t i = r; i < tile.padded() * tile.pitch; i += 4 * tile.pitch) {
      const Four e = exponential(load_four(tile, values + i) - most, factor);
      store_four(tile, values + i, e);
      total = total + e;
    }
    store(sum + r, sum_of(total));
  }
}

// to = from * factors[row]
DALLE_NOINLINE inline void scale_tile(const Tile& tile, const float* from, const float* factors, float* to) {
  for (int64_t c = 0; c < tile.columns; ++c) {
    for (int64_t r = 0; r < tile.pitch; r += Vector::width) {
      store(to + c * tile.pitch + r, load(from + c * tile.pitch + r) * load(factors + r));
    }
  }
}

// values = exp(scores - largest), where the maximum over all tiles is known.
inline void draw_tile(const BlockNoise& noise, const Tile& tile, const Factor& factor, const float* logits,
                      const float* largest, float* values) {
  float unused[MOST_ROWS];
  memcpy(unused, largest, tile.pitch * sizeof(float));
  score_tile(noise, tile, logits, values, unused);
  exponential_tile(tile, factor, largest, values, unused);
}

// The soft sample's running maximum and sum.
class RunningSoftmax {
 public:
  RunningSoftmax(const BlockNoise& noise, const Factor& factor, int64_t pitch) : noise_(noise), factor_(factor) {
    for (int64_t r = 0; r < pitch; ++r) largest[r] = LOWEST, sum[r] = 0.0;
  }

  // The next tile: values = exp(scores - largest), and by what all earlier values shrink.
  void draw(const Tile& tile, const float* logits, float* values, float* shrink) {
    float tile_sum[MOST_ROWS];
    memcpy(shrink, largest, tile.pitch * sizeof(float));
    score_tile(noise_, tile, logits, values, largest);
    exponential_tile(tile, factor_, largest, values, tile_sum);
    factors(tile, shrink, shrink);
    for (int64_t r = 0; r < tile.pitch; ++r) sum[r] = sum[r] * shrink[r] + tile_sum[r];
  }

  // to = exp(from - largest): from a former maximum to the latest.
  void factors(const Tile& tile, const float* from, float* to) const {
    for (int64_t r = 0; r < tile.pitch; r += Vector::width) {
      store(to + r, exp2_of_product(load(from + r) - load(largest + r), factor_));
    }
  }

  float largest[MOST_ROWS];
  double sum[MOST_ROWS];

 private:
  const BlockNoise& noise_;
  const Factor& factor_;
};

constexpr int64_t tiles_of(int64_t columns) { return (columns + TILE_COLUMNS - 1) / TILE_COLUMNS; }

// The soft sample of a block: `draw` every tile in order, and then take any tile of it. The first tiles' exponentials
// are kept, as many as fit, and the others' computed again, to the same bits, from the maximum they had; or none are,
// and the caller keeps all of them elsewhere.
class SoftSample {
 public:
  static constexpr int64_t MOST_KEPT_FLOATS = (896 << 10) / 4;
  enum class Keep { tiles, none };
  static int64_t scratch_floats(int64_t columns, int64_t pitch, Keep keep) {
    return tiles_of(columns) * pitch + kept_columns(columns, pitch, keep) * pitch;
  }

  SoftSample(const BlockNoise& noise, const Factor& factor, int64_t columns, int64_t pitch, Keep keep, float* scratch)
      : noise_(noise),
        factor_(factor),
        softmax_(noise, factor, pitch),
        kept_columns_(kept_columns(columns, pitch, keep)),
        largest_(scratch),
        kept_(scratch + tiles_of(columns) * pitch) {}

  bool keeps(const Tile& tile) const { return tile.first < kept_columns_; }

  // `values` is scratch for a tile: it takes the exponentials where they are not kept.
  void draw(const Tile& tile, const float* logits, float* values) {
    float shrink[MOST_ROWS];
    softmax_.draw(tile, logits, keeps(tile) ? kept(tile) : values, shrink);
    memcpy(largest_of(tile), softmax_.largest, tile.pitch * sizeof(float));
  }

  // Reads the logits only if it does not keep the tile.
  void sample(const Tile& tile, const float* logits, float* y) const {
    if (!keeps(tile)) draw_tile(noise_, tile, factor_, logits, largest_of(tile), y);
    normalize(tile, keeps(tile) ? kept(tile) : y, y);
  }

  // From the exponentials that `draw` gave.
  void normalize(const Tile& tile, const float* values, float* y) const {
    float factors[MOST_ROWS];
    softmax_.factors(tile, largest_of(tile), factors);
    for (int64_t r = 0; r < tile.pitch; ++r) factors[r] /= static_cast<float>(softmax_.sum[r]);
    scale_tile(tile, values, factors, y);
  }

 private:
  static int64_t kept_columns(int64_t columns, int64_t pitch, Keep keep) {
    if (keep == Keep::none) return 0;
    const int64_t fitting = MOST_KEPT_FLOATS / (TILE_COLUMNS * pitch), all = tiles_of(columns);
    return TILE_COLUMNS * (fitting < all ? fitting : all);
  }
  float* largest_of(const Tile& tile) const { return largest_ + tile.first / TILE_COLUMNS * tile.pitch; }
  float* kept(const Tile& tile) const { return kept_ + tile.first * tile.pitch; }

  const BlockNoise& noise_;
  const Factor& factor_;
  RunningSoftmax softmax_;
  int64_t kept_columns_;
  float *largest_, *kept_;
};

// A column's number as float: exact up to 2^24, beyond which calls are turned away.
DALLE_INLINE Vector number_of(const Tile& tile, int64_t c) { return broadcast(static_cast<float>(tile.first + c)); }

// The one-hot sample of a block: `draw` every tile in order, and then take any tile of it by `sample`.
class HardSample {
 public:
  HardSample(const BlockNoise& noise, int64_t pitch) : noise_(noise) {
    for (int64_t r = 0; r < pitch; ++r) largest_[r] = -INFINITY_FLOAT, index_[r] = -1.0f, poison_[r] = 0.0f;
  }

  void draw(const Tile& tile, const float* logits, float* values) {
    float unused[MOST_ROWS];
    memcpy(unused, largest_, tile.pitch * sizeof(float));
    score_tile(noise_, tile, logits, values, unused);
    find(tile, values);
  }

  DALLE_NOINLINE void sample(const Tile& tile, float* y) const {
    const Vector zero = broadcast(0.0f), one = broadcast(1.0f);
    for (int64_t r = 0; r < tile.pitch; r += Vector::width) {
      // 0, or NaN for a row with NaN, with +inf or with nothing but -inf.
      const Vector none = load(poison_ + r) + load(largest_ + r) * zero, index = load(index_ + r);
      for (int64_t c = 0; c < tile.columns; ++c) {
        store(y + c * tile.pitch + r, none + select_equal(index, number_of(tile, c), one, zero));
      }
    }
  }

 private:
  // The first of the largest scores.
  DALLE_NOINLINE void find(const Tile& tile, const float* scores) {
    for (int64_t r = 0; r < tile.pitch; r += Vector::width) {
      Vector most = load(largest_ + r), poison = load(poison_ + r), index = load(index_ + r);
      for (int64_t c = 0; c < tile.padded(); ++c) {
        const Vector score = load(scores + c * tile.pitch + r);
        index = select_less(most, score, number_of(tile, c), index);
        most = maximum(score, most);
        poison = multiply_add(maximum(broadcast(LOWEST), score), broadcast(0.0f), poison);
      }
      store(largest_ + r, most);
      store(poison_ + r, poison);
      store(index_ + r, index);
    }
  }

  const BlockNoise& noise_;
  float largest_[MOST_ROWS], index_[MOST_ROWS], poison_[MOST_ROWS];
};

// ln q but for a constant, bounded below where q is 0 for certain, so that 0 * ln 0 is 0.
DALLE_INLINE Vector log_ratio(Vector logits, Vector largest) {
  return maximum(broadcast(-1000.0f), logits - largest);
}
DALLE_INLINE Four log_ratio(const Four& logits, Vector largest) {
  return maximum(four(broadcast(-1000.0f)), logits - four(largest));
}

// A number summed for every row of a block, tile after tile: over TILE_COLUMNS columns in single precision, over all of
// them in double.
template <int64_t ROWS>
struct RowSums {
  explicit RowSums(int64_t pitch) {
    for (int64_t r = 0; r < pitch; ++r) recent[r] = 0.0f, sum[r] = 0.0;
  }

  [[gnu::always_inline]] void add(int64_t r, Vector x) { store(recent + r, load(recent + r) + x); }
  // After the last step of a tile.
  void close(const Tile& tile) {
    if (!tile.ends_sum) return;
    for (int64_t r = 0; r < tile.pitch; ++r) sum[r] += recent[r], recent[r] = 0.0f;
  }

  float recent[ROWS];
  double sum[ROWS];
};

// q = softmax(logits) of a block and its KL to the uniform prior: `add` every tile.
template <int64_t ROWS = MOST_ROWS>
class Posterior {
 public:
  explicit Posterior(int64_t pitch) : sums_(pitch), moments_(pitch), factor_(LOG2_E) {
    for (int64_t r = 0; r < pitch; ++r) largest[r] = LOWEST;
  }

  template <class T>
  DALLE_NOINLINE void add(const Tile& tile, const Columns<T>& logits) {
    for (int64_t c = 0; c < tile.columns; c += STEP_COLUMNS) {
      for (int64_t r = 0; r < tile.pitch; r += Vector::width) add(r, load_four(logits, c, r));
    }
    close(tile);
  }

  // One step of a tile, after the last of which it is closed.
  [[gnu::always_inline]] void add(int64_t r, const Four& logits) {
    const Vector before = load(largest + r), most = maximum(largest_of(logits), before);
    if (any_less(before, most)) grow(r, most);
    const Four d = log_ratio(logits, most), e = exponential(d, factor_);
    sums_.add(r, sum_of(e));
    moments_.add(r, dot_of(e, d));
  }
  void close(const Tile& tile) {
    sums_.close(tile);
    moments_.close(tile);
  }

  double sum(int64_t row) const { return sums_.sum[row]; }
  // sum q ln(q / the largest q)
  double mean(int64_t row) const { return moments_.sum[row] / sums_.sum[row]; }
  // In nats.
  float kl(int64_t row, int64_t columns) const {
    const double kl = mean(row) - __builtin_log(sum(row)) + __builtin_log(static_cast<double>(columns));
    return static_cast<float>(kl < 0 ? 0.0 : kl);
  }

  float largest[ROWS];

 private:
  // To larger maxima, which a row rarely meets. Rows whose maximum stays keep every bit.
  DALLE_NOINLINE void grow(int64_t first, Vector most) {
    float steps[Vector::width], shrinks[Vector::width];
    const Vector step = log_ratio(load(largest + first), most);
    store(steps, step);
    store(shrinks, exp2_of_product(step, factor_));
    for (int64_t i = 0; i < Vector::width; ++i) {
      const int64_t r = first + i;
      moments_.recent[r] = shrinks[i] * (moments_.recent[r] + sums_.recent[r] * steps[i]);
      moments_.sum[r] = shrinks[i] * (moments_.sum[r] + sums_.sum[r] * steps[i]);
      sums_.recent[r] *= shrinks[i];
      sums_.sum[r] *= shrinks[i];
    }
    store(largest + first, most);
  }

  RowSums<ROWS> sums_, moments_;  // of exp(logits - largest), and of that times its logarithm
  Factor factor_;
};

// What a block's gradient needs of its rows: the sum of y * grad_y, and with the KL the posterior. All of a tile is
// read at once, since memory that is waited for by itself keeps the processor idle.
template <class T, int64_t ROWS>
DALLE_NOINLINE void add_tile(const Tile& tile, const Columns<T>& logits, const Columns<T>& y, const Columns<T>& grad_y,
                             RowSums<ROWS>& dot, Posterior<ROWS>* posterior) {
  for (int64_t c = 0; c < tile.columns; c += STEP_COLUMNS) {
    for (int64_t r = 0; r < tile.pitch; r += Vector::width) {
      if (posterior != nullptr) posterior->add(r, load_four(logits, c, r));
      dot.add(r, dot_of(load_four(y, c, r), load_four(grad_y, c, r)));
    }
  }
  dot.close(tile);
  if (posterior != nullptr) posterior->close(tile);
}

// The gradient of the KL, grad_kl * q * (ln q - sum q ln q).
template <int64_t ROWS = MOST_ROWS>
class PosteriorGradient {
 public:
  // `grad_kl` has one column of float32, for these rows of all.
  PosteriorGradient(const Posterior<ROWS>& posterior, const RowTensor& grad_kl, int64_t first, int64_t rows,
                    int64_t pitch)
      : factor_(LOG2_E) {
    for (int64_t r = 0; r < pitch; ++r) weight_[r] = 0.0f;
    for (int64_t begin = 0; begin < rows; begin += MOST_ROWS) {
      const RowBlock block(grad_kl, first + begin, rows - begin < MOST_ROWS ? rows - begin : MOST_ROWS);
      for (int64_t i = 0; i < block.runs; ++i) {
        read_run(static_cast<const float*>(block.data) + block.run[i].offset, block.run[i].count,
                 weight_ + begin + block.run[i].lane);
      }
    }
    for (int64_t r = 0; r < pitch; ++r) {
      largest_[r] = posterior.largest[r];
      mean_[r] = static_cast<float>(posterior.mean(r));
      weight_[r] /= static_cast<float>(posterior.sum(r));
    }
  }

  // What is added to `gradient`, that of a step.
  [[gnu::always_inline]] Four added(int64_t r, const Four& logits, const Four& gradient) const {
    const Four d = log_ratio(logits, load(largest_ + r));
    const Four q = exponential(d, factor_) * four(load(weight_ + r));
    return multiply_add(q, d - four(load(mean_ + r)), gradient);
  }

 private:
  Factor factor_;
  float weight_[ROWS], largest_[ROWS], mean_[ROWS];
};

// The gradient of a soft sample, y * (grad_y - dot) / tau, dot being the sum of y * grad_y.
template <int64_t ROWS = MOST_ROWS>
class SampleGradient {
 public:
  SampleGradient(const RowSums<ROWS>& dot, float tau, int64_t pitch) : inverse_tau_(broadcast(1.0f / tau)) {
    for (int64_t r = 0; r < pitch; ++r) dot_[r] = static_cast<float>(dot.sum[r]);
  }

  [[gnu::always_inline]] Four of(int64_t r, const Four& y, const Four& grad_y) const {
    return y * (grad_y - four(load(dot_ + r))) * four(inverse_tau_);
  }

 private:
  Vector inverse_tau_;
  float dot_[ROWS];
};

// The gradient of a tile's logits, with that of the KL unless `posterior` is nullptr. It may be where a copy of grad_y
// lies.
template <class T, int64_t ROWS>
DALLE_NOINLINE void gradient_tile(const Tile& tile, const Columns<T>& logits, const Columns<T>& y,
                                  const Columns<T>& grad_y, const SampleGradient<ROWS>& sample,
                                  const PosteriorGradient<ROWS>* posterior, float* gradient) {
  for (int64_t c = 0; c < tile.columns; c += STEP_COLUMNS) {
    for (int64_t r = 0; r < tile.pitch; r += Vector::width) {
      Four step = sample.of(r, load_four(y, c, r), load_four(grad_y, c, r));
      if (posterior != nullptr) step = posterior->added(r, load_four(logits, c, r), step);
      store_four(tile, gradient + c * tile.pitch + r, step);
    }
  }
}

}  // namespace dalle::DALLE_ISA_NAMESPACE
