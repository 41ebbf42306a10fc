// The matrix product on the CPU. A piece of B, up to BLOCK_DEPTH deep and BLOCK_COLUMNS wide, is packed for all threads
// and stays in the shared cache; a thread packs a block of A's rows, which stays in its own cache, and multiplies it by
// all of the piece. Packed, both lie in panels that a register block walks from front to back: [step][rows or columns].
// The operands' dtypes and strides end with the packing.
#include "linear/product.h"

#include "common/integer.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/vector.h"

namespace dalle::DALLE_ISA_NAMESPACE {
namespace {

constexpr int64_t WIDTH = Vector::width;
// A register block: with two registers of columns, as many rows as leave room for the operands.
constexpr int64_t VECTORS = 2, PANEL_COLUMNS = VECTORS * WIDTH, PANEL_ROWS = WIDTH == 16 ? 12 : 6;
constexpr int64_t BLOCK_DEPTH = 256;      // a panel of B (AVX2: 16 KiB) stays in the first cache
constexpr int64_t BLOCK_COLUMNS = 4096;   // 4 MiB of the shared cache
constexpr int64_t BLOCK_ROWS = 192;       // 192 KiB of a thread's own cache
constexpr int64_t SUMMED_ROWS = 4096;     // at a time, where sums of 32 bits are kept on their way to 16:
constexpr int64_t SUMS_FLOATS = 2 << 20;  // 8 MiB of them
constexpr int64_t GRAIN = 1 << 18;        // multiply-adds that are worth a thread
constexpr int64_t COPY_GRAIN = 1 << 14;   // and copies
constexpr int64_t STEPS_AHEAD = 8;        // fetched while a step is copied
constexpr int64_t TURNED_STEPS = WIDTH > 8 ? WIDTH : 8;  // transposed at a time
constexpr int64_t SLACK = 16;

// Whole registers of a panel of rows may end in the place of the next step, of a panel of columns they must not: there
// another thread may have written.
static_assert(rounded_up(PANEL_ROWS, larger(WIDTH, 8)) - PANEL_ROWS <= SLACK, "what a panel of rows writes too much");
static_assert(PANEL_COLUMNS % larger(WIDTH, 8) == 0, "a panel of columns is whole registers");

// Rows of A, or columns of B: `count` lines `stride` apart, whose steps along the depth are `step` apart.
struct Lines {
  const void* data;
  Dtype dtype;
  int64_t count, stride, step;
};

// to[j * to_stride + i] = from[i * stride + j] for eight lines i and TURNED_STEPS steps j. Rows of `to` are written in
// their order, since the last floats of each may lie in the place of the next.
DALLE_INLINE void turn(const float* from, int64_t stride, float* to, int64_t to_stride) {
  for (int64_t j = 0; j < TURNED_STEPS; j += 8) transpose_8x8(from + j, stride, to + j * to_stride, to_stride);
}
template <class T>
DALLE_INLINE void turn(const T* from, int64_t stride, float* to, int64_t to_stride) {
  float wide[8 * TURNED_STEPS];
  for (int64_t i = 0; i < 8; ++i) {
    for (int64_t j = 0; j < TURNED_STEPS; j += WIDTH) store(wide + i * TURNED_STEPS + j, load(from + i * stride + j));
  }
  turn(wide, TURNED_STEPS, to, to_stride);
}

// to[t * LINES + i] = line first + i at step t, for t < steps; zeros for lines that are not there. May write SLACK
// floats more.
template <int64_t LINES, class T>
DALLE_NOINLINE void pack_panel(const Lines& lines, int64_t first, int64_t first_step, int64_t steps, float* to) {
  const T* from = static_cast<const T*>(lines.data) + first * lines.stride + first_step * lines.step;
  const int64_t left = lines.count - first;
  // Whole registers hold lines of the next panel too, which end up in the place of the next step before it is written.
  constexpr int64_t COPIED = rounded_up(LINES, WIDTH), TURNED = rounded_up(LINES, 8);
  int64_t t = 0;
  if (lines.stride == 1 && left >= COPIED) {
    for (; t < steps; ++t, to += LINES) {
      __builtin_prefetch(from + (t + STEPS_AHEAD) * lines.step);
      for (int64_t i = 0; i < COPIED; i += WIDTH) store(to + i, load(from + t * lines.step + i));
    }
  } else if (lines.step == 1 && left >= TURNED) {
    for (; t + TURNED_STEPS <= steps; t += TURNED_STEPS, to += TURNED_STEPS * LINES) {
      for (int64_t i = TURNED - 8; i >= 0; i -= 8) turn(from + i * lines.stride + t, lines.stride, to + i, LINES);
    }
  }
  for (; t < steps; ++t, to += LINES) {
    for (int64_t i = 0; i < LINES; ++i) to[i] = i < left ? to_float(from[i * lines.stride + t * lines.step]) : 0.0f;
  }
}

// The panels that hold lines [begin, end), one after the other.
template <int64_t LINES>
void pack(const Lines& lines, int64_t begin, int64_t end, int64_t first_step, int64_t steps, float* to) {
  const auto panels = lines.dtype == Dtype::float32   ? pack_panel<LINES, float>
                      : lines.dtype == Dtype::float16 ? pack_panel<LINES, Half>
                                                      : pack_panel<LINES, BFloat16>;
  for (int64_t first = begin; first < end; first += LINES, to += LINES * steps) {
    panels(lines, first, first_step, steps, to);
  }
}

// What is added to the products of rows and columns: sums of them before, or a bias, whose stride between rows is 0.
struct Addend {
  const float* data;  // nullptr: nothing
  int64_t stride;

  Addend from(int64_t row, int64_t column) const {
    return {data == nullptr ? nullptr : data + row * stride + column, stride};
  }
};

// sums[r * stride + c] = the sum over all steps of a[step][r] * b[step][c], and what `before` has for it.
DALLE_NOINLINE void multiply_panels(const float* a, const float* b, int64_t steps, const Addend& before, float* sums,
                                    int64_t stride) {
  Vector sum[PANEL_ROWS][VECTORS];
  for (int r = 0; r < PANEL_ROWS; ++r) {
    for (int v = 0; v < VECTORS; ++v) sum[r][v] = broadcast(0.0f);
    __builtin_prefetch(sums + r * stride, 1);
    __builtin_prefetch(sums + r * stride + PANEL_COLUMNS - 1, 1);
  }
#pragma GCC unroll 4
  for (int64_t t = 0; t < steps; ++t, a += PANEL_ROWS, b += PANEL_COLUMNS) {
    Vector columns[VECTORS];
    for (int v = 0; v < VECTORS; ++v) columns[v] = load(b + v * WIDTH);
    for (int r = 0; r < PANEL_ROWS; ++r) {
      const Vector row = broadcast(a[r]);
      for (int v = 0; v < VECTORS; ++v) sum[r][v] = multiply_add(row, columns[v], sum[r][v]);
    }
  }
  for (int r = 0; r < PANEL_ROWS; ++r) {
    for (int v = 0; v < VECTORS; ++v) {
      float* to = sums + r * stride + v * WIDTH;
      if (before.data != nullptr) sum[r][v] = load(before.data + r * before.stride + v * WIDTH) + sum[r][v];
      store(to, sum[r][v]);
    }
  }
}

// How a product is cut, and the memory that it takes.
struct Cut {
  int threads;
  int64_t pieces, steps;  // of the depth, and of each of them (of the last one less)
  int64_t width;          // columns at a time
  int64_t group;          // pieces of so many columns that are packed at a time
  int64_t height;         // rows at a time
  bool summed;            // sums of 32 bits are kept on their way to 16

  Cut(const Product& p, bool narrow)
      : threads(static_cast<int>(smaller(p.threads, p.rows * p.columns * p.depth / GRAIN + 1))),
        pieces(larger(1, quotient_up(p.depth, BLOCK_DEPTH))),
        steps(quotient_up(p.depth, pieces)),
        summed(narrow && pieces > 1) {
    const int64_t most = summed ? smaller(BLOCK_COLUMNS, SUMS_FLOATS / p.rows) : BLOCK_COLUMNS;
    width = smaller(larger(most / PANEL_COLUMNS, 1) * PANEL_COLUMNS, rounded_up(p.columns, PANEL_COLUMNS));
    group = smaller(pieces, larger(1, BLOCK_COLUMNS / width));
    const int64_t blocks = rounded_up(quotient_up(p.rows, BLOCK_ROWS), threads);
    height = rounded_up(quotient_up(p.rows, blocks), PANEL_ROWS);
  }
};

// Out: the type of the results.
template <class Out>
class Multiplication {
 public:
  explicit Multiplication(const Product& p)
      : p_(p),
        cut_(p, sizeof(Out) < sizeof(float)),
        rows_{p.a.data, p.a.dtype, p.rows, p.a.row_stride, p.a.column_stride},
        columns_{p.b.data, p.b.dtype, p.columns, p.b.column_stride, p.b.row_stride},
        packed_columns_(1, cut_.group * cut_.width * cut_.steps),
        packed_rows_(cut_.threads, cut_.height * cut_.steps + SLACK),
        sums_(1, cut_.summed ? p.rows * cut_.width : 0) {}

  const char* run() const {
    if (packed_columns_.failed() || packed_rows_.failed() || sums_.failed()) {
      return "not enough memory for the packed operands";
    }
    for (int64_t left = 0; left < p_.columns; left += cut_.width) {
      const int64_t right = smaller(left + cut_.width, p_.columns);
      for (int64_t first = 0; first < cut_.pieces; first += cut_.group) {
        const int64_t last = smaller(first + cut_.group, cut_.pieces);
        pack_columns(left, right, first, last);
        parallel_items(quotient_up(p_.rows, cut_.height), cut_.threads, [&](int64_t item, int thread) {
          float* packed = packed_rows_.of(thread);
          const int64_t top = item * cut_.height, bottom = smaller(top + cut_.height, p_.rows);
          for (int64_t piece = first; piece < last; ++piece) {
            pack<PANEL_ROWS>(rows_, top, bottom, piece * cut_.steps, steps_of(piece), packed);
            multiply(packed, packed_piece(piece - first), {top, bottom, left, right}, piece);
          }
        });
      }
    }
    return nullptr;
  }

 private:
  struct Area {
    int64_t top, bottom, left, right;
  };

  int64_t steps_of(int64_t piece) const { return smaller(cut_.steps, p_.depth - piece * cut_.steps); }
  float* packed_piece(int64_t index) const { return packed_columns_.of(0) + index * cut_.width * cut_.steps; }

  // Of the pieces [first, last).
  void pack_columns(int64_t left, int64_t right, int64_t first, int64_t last) const {
    const int64_t panels = quotient_up(right - left, PANEL_COLUMNS), grain = COPY_GRAIN / (PANEL_COLUMNS * BLOCK_DEPTH);
    parallel_for(panels * (last - first), grain, cut_.threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t piece = first + i / panels, column = i % panels * PANEL_COLUMNS, steps = steps_of(piece);
        float* to = packed_piece(piece - first) + column * steps;
        pack<PANEL_COLUMNS>(columns_, left + column, smaller(left + column + PANEL_COLUMNS, right),
                            piece * cut_.steps, steps, to);
      }
    });
  }

  // Rows and columns of `area` by what is packed of them and of a piece of the depth.
  void multiply(const float* a, const float* b, const Area& area, int64_t piece) const {
    const int64_t steps = steps_of(piece), stride = cut_.summed ? cut_.width : p_.out_stride;
    float* sums = sums_.of(0);
    if (sizeof(Out) == sizeof(float)) sums = static_cast<float*>(p_.out) + area.left;
    const Addend none{nullptr, 0}, bias{p_.bias == nullptr ? nullptr : p_.bias + area.left, 0}, summed{sums, stride};
    const Addend& first = p_.accumulate ? summed : p_.bias == nullptr ? none : bias;
    const Addend& before = piece == 0 ? first : summed;
    const bool rounded = sizeof(Out) < sizeof(float) && piece == cut_.pieces - 1;
    for (int64_t column = area.left; column < area.right; column += PANEL_COLUMNS) {
      for (int64_t row = area.top; row < area.bottom; row += PANEL_ROWS) {
        const float *rows = a + (row - area.top) * steps, *columns = b + (column - area.left) * steps;
        const Addend term = before.from(row, column - area.left);
        const bool whole = area.bottom - row >= PANEL_ROWS && area.right - column >= PANEL_COLUMNS;
        if (whole && !rounded) {
          multiply_panels(rows, columns, steps, term, sums + row * stride + column - area.left, stride);
          continue;
        }
        float block[PANEL_ROWS * PANEL_COLUMNS];
        multiply_panels(rows, columns, steps, none, block, PANEL_COLUMNS);
        if (rounded) {
          Out* out = static_cast<Out*>(p_.out) + row * p_.out_stride + column;
          store_block(block, row, column, term, out, p_.out_stride);
        } else {
          store_block(block, row, column, term, sums + row * stride + column - area.left, stride);
        }
      }
    }
  }

  // The part of a block that lies within the result.
  template <class To>
  void store_block(const float* block, int64_t row, int64_t column, const Addend& before, To* to,
                   int64_t stride) const {
    const int64_t rows = smaller(PANEL_ROWS, p_.rows - row), columns = smaller(PANEL_COLUMNS, p_.columns - column);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; c += WIDTH) {
        Vector x = load(block + r * PANEL_COLUMNS + c);
        if (before.data != nullptr) x = load_first(before.data + r * before.stride + c, columns - c) + x;
        store_first(to + r * stride + c, columns - c, x);
      }
    }
  }

  const Product& p_;
  const Cut cut_;
  const Lines rows_, columns_;
  const Scratch packed_columns_, packed_rows_, sums_;
};

// In parts of the rows where sums are kept: all of them at once would leave room for few columns at a time.
template <class Out>
const char* multiply_to(const Product& p) {
  if (sizeof(Out) == sizeof(float) || p.depth <= BLOCK_DEPTH) return Multiplication<Out>(p).run();
  const int64_t bytes = p.a.dtype == Dtype::float32 ? 4 : 2;
  for (int64_t row = 0; row < p.rows; row += SUMMED_ROWS) {
    Product part = p;
    part.rows = smaller(SUMMED_ROWS, p.rows - row);
    part.a.data = static_cast<const char*>(p.a.data) + row * p.a.row_stride * bytes;
    part.out = static_cast<Out*>(p.out) + row * p.out_stride;
    if (const char* status = Multiplication<Out>(part).run()) return status;
  }
  return nullptr;
}

}  // namespace

const char* product(const Product& p) {
  if (p.a.dtype == Dtype::float64 || p.b.dtype == Dtype::float64) return "expected float32, float16 or bfloat16";
  if (p.accumulate && p.out_dtype != Dtype::float32) return "expected float32 to add to";
  if (p.rows == 0 || p.columns == 0) return nullptr;
  switch (p.out_dtype) {
    case Dtype::float32: return multiply_to<float>(p);
    case Dtype::float16: return multiply_to<Half>(p);
    case Dtype::bfloat16: return multiply_to<BFloat16>(p);
    default: return "expected float32, float16 or bfloat16";
  }
}

}  // namespace dalle::DALLE_ISA_NAMESPACE
