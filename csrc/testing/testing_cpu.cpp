#include "testing/testing.h"

#include "common/vector_math.h"
#include "gumbel_softmax/sample.h"

namespace dalle::DALLE_ISA_NAMESPACE {
namespace {

template <class Function>
const char* apply(const Elementwise& p, const Function& function) {
  for (int64_t i = 0; i < p.count; i += Vector::width) {
    store_first(p.output + i, p.count - i, function(load_first(p.input + i, p.count - i)));
  }
  return nullptr;
}

}  // namespace

const char* elementwise(const Elementwise& p) {
  switch (p.function) {
    case ElementwiseFunction::exponential: return apply(p, [](Vector x) { return exponential(x); });
    case ElementwiseFunction::natural_log: return apply(p, [](Vector x) { return natural_log(x); });
    case ElementwiseFunction::log1p: return apply(p, [](Vector x) { return log1p(x); });
  }
  return "unknown function";
}

const char* uniform_noise(const UniformNoise& p) {
  const PhiloxKey key(p.seed);
  float v[TILE_FLOATS];
  for (int64_t first = 0; first < p.rows; first += MOST_ROWS) {
    const BlockNoise noise(key, p.offset + static_cast<uint64_t>(first), MOST_ROWS);
    for (int64_t t = 0; t < tiles_of(p.columns); ++t) {
      const Tile tile(t, p.columns, MOST_ROWS);
      uniform_tile(noise, tile, v);
      for (int64_t c = 0; c < tile.columns; ++c) {
        memcpy(p.v + (tile.first + c) * p.rows + first, v + c * MOST_ROWS, MOST_ROWS * sizeof(float));
      }
    }
  }
  return nullptr;
}

}  // namespace dalle::DALLE_ISA_NAMESPACE
