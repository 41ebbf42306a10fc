#include "common/cuda.h"
#include "powersgd/grid.h"
#include "powersgd/mma.h"
#include "powersgd/powersgd.h"

namespace dalle::cuda {
namespace {

constexpr int THREADS = 256;
constexpr int SIDE = 32;  // of a tile; a warp multiplies 16 rows and 8 columns of one
constexpr int EIGHT = 8;
constexpr int PITCH = SIDE + 4;  // of a tile's rows: those that half a warp reads at once lie in different banks
constexpr unsigned ALL = 0xffffffffu;
constexpr double UNIT = 1.1102230246251565e-16;      // 2^-53
constexpr double TOLERANCE = 2.98023223876953125e-8;  // 2^-25: a loss of orthogonality below float32's own
constexpr int ATTEMPTS = 2;

// What *certified says.
constexpr int NOT_YET = 0, YES = 1, FAILED = -1;

// The matrix that the elimination works on holds in its tiles above the diagonal and on it what is left of the scaled
// Gram matrix, and below it what is so far of L^-1.
struct Workspace {
  double* matrix;    // [n, n]
  double* diagonal;  // [tiles, 32, 32]: W = L^-1 of the tiles on the diagonal
  double* scales;    // d_i = gram_ii^-1/2: D gram D has a diagonal of ones, whose condition alone counts
  double* norms;     // [n, 4 tiles]: of each eight elements of the rows of L^-1, squared
  unsigned* arrived;
  unsigned* failed;  // for each attempt
};

__host__ __device__ inline int tiles_of(int n) { return (n + SIDE - 1) / SIDE; }

__host__ __device__ inline int64_t workspace_size(int n) {
  const int64_t size = n, tiles = tiles_of(n);
  return size * size + tiles * SIDE * SIDE + size + size * tiles * (SIDE / EIGHT);
}

// What the blocks of a matrix tell each other, for all matrices behind their workspaces.
constexpr int WORDS = 1 + ATTEMPTS;

__host__ __device__ inline unsigned* words_of(const CholeskyInverse& p) {
  return reinterpret_cast<unsigned*>(p.workspace + p.matrices * workspace_size(p.n));
}

__device__ Workspace workspace_of(const CholeskyInverse& p, int matrix) {
  const int64_t n = p.n, tiles = tiles_of(p.n);
  Workspace w;
  w.matrix = p.workspace + matrix * workspace_size(p.n);
  w.diagonal = w.matrix + n * n;
  w.scales = w.diagonal + tiles * SIDE * SIDE;
  w.norms = w.scales + n;
  w.arrived = words_of(p) + matrix * WORDS;
  w.failed = w.arrived + 1;
  return w;
}

using Tile = double[SIDE][PITCH];

struct Shared {
  Tile inverse;  // W of this step
  Tile raw, left, right;
};

// The four elements of a tile that a thread moves.
struct Four {
  double x[4];
};

__device__ Four load(const CholeskyInverse& p, const double* matrix, int i, int j) {
  Four four;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int row = i * SIDE + threadIdx.x / 32 + EIGHT * k, column = j * SIDE + threadIdx.x % 32;
    // Past the edge the matrix continues as the identity.
    const bool inside = row < p.n && column < p.n;
    four.x[k] = inside ? matrix[static_cast<int64_t>(row) * p.n + column] : row == column ? 1.0 : 0.0;
  }
  return four;
}

__device__ void keep(Tile& tile, const Four& four) {
#pragma unroll
  for (int k = 0; k < 4; ++k) tile[threadIdx.x / 32 + EIGHT * k][threadIdx.x % 32] = four.x[k];
}

// A thread's part of a product: x[2 i + j] is the element row() + 8 i, column() + j.
struct Part {
  double x[4];

  __device__ static int row() { return threadIdx.x / 128 * 16 + threadIdx.x % 32 / 4; }
  __device__ static int column() { return threadIdx.x / 32 % 4 * EIGHT + threadIdx.x % 4 * 2; }

  // Calls use(row, column, element) for each.
  template <class Use>
  __device__ void each(Use use) {
#pragma unroll
    for (int i = 0; i < 4; ++i) use(row() + i / 2 * EIGHT, column() + i % 2, x[i]);
  }
};

// a b, or a' b.
template <bool TRANSPOSED>
__device__ Part product(const Tile& a, const Tile& b) {
  const int lane = threadIdx.x % 32, place = lane % 4, row = Part::row();
  const int column = threadIdx.x / 32 % 4 * EIGHT + lane / 4;
  Part part = {};
#pragma unroll
  for (int depth = 0; depth < SIDE; depth += EIGHT) {
    double left[4], right[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int at = depth + place + 4 * j;
      right[j] = b[at][column];
#pragma unroll
      for (int i = 0; i < 2; ++i) left[2 * j + i] = TRANSPOSED ? a[at][row + EIGHT * i] : a[row + EIGHT * i][at];
    }
    multiply_add(part.x, left, right);
  }
  return part;
}

__device__ void keep(Tile& tile, Part part) {
  part.each([&](int row, int column, double x) { tile[row][column] = x; });
}

// To within some units of the last place.
__device__ double reciprocal(double x) {
#if defined(__CUDA_ARCH__)
  double y;
  asm("rcp.approx.ftz.f64 %0, %1;" : "=d"(y) : "d"(x));
  y += y * (1 - x * y);
  return y + y * (1 - x * y);
#else
  return 1 / x;
#endif
}

// W = L^-1 of the tile on the diagonal that is in shared.raw, to its place k: elimination on [tile | I] leaves D L^-1
// to the right, its rows divided by the square roots of the pivots D are W. A thread has every eighth number of one
// row. A pivot that is not positive is taken for 1.
__device__ void invert_diagonal(const Workspace& w, Shared& shared, int k, int attempt) {
  const int row = threadIdx.x / EIGHT, first = threadIdx.x % EIGHT;
  Tile &left = shared.left, &right = shared.right;  // row c of each as it was when its turn came
  double x[EIGHT];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[i] = shared.raw[row][first + EIGHT * i];
    x[i + 4] = row == first + EIGHT * i ? 1.0 : 0.0;
  }
  __syncthreads();
  for (int c = 0; c < SIDE; ++c) {
    if (row == c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        left[c][first + EIGHT * i] = x[i];
        right[c][first + EIGHT * i] = x[i + 4];
      }
    }
    __syncthreads();
    if (row > c) {
      const double pivot = left[c][c];
      // Below the diagonal column c of the tile mirrors row c.
      const double factor = left[c][row] * (pivot > 0 ? reciprocal(pivot) : 1.0);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[i] -= factor * left[c][first + EIGHT * i];
        x[i + 4] -= factor * right[c][first + EIGHT * i];
      }
    }
  }
  const double pivot = left[row][row];
  if (!(pivot > 0)) w.failed[attempt] = 1;
  const double scale = pivot > 0 ? rsqrt(pivot) : 1.0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    w.diagonal[(k * SIDE + row) * SIDE + first + EIGHT * i] = right[row][first + EIGHT * i] * scale;
  }
}

// As large as the rounding errors of the scaled Gram matrix, so that its decomposition succeeds; of a matrix that
// misses most of its rank they grow on the way, and a second attempt takes a shift that covers that.
__device__ double shift_of(int n, int attempt) {
  return UNIT * (attempt == 0 ? 8 * sqrt(static_cast<double>(n)) : 64.0 * n);
}

__device__ double element(const CholeskyInverse& p, int row, int column) {
  const int64_t at = static_cast<int64_t>(row) * p.n + column, count = static_cast<int64_t>(p.n) * p.n;
  double sum = 0;
  for (int part = 0; part < p.parts; ++part) sum += p.gram[part * count + at];
  return sum;
}

__device__ double scale_of(const CholeskyInverse& p, int row) {
  const double square = element(p, row, row);
  return square > 0 ? rsqrt(square) : 1.0;
}

// The scaled Gram matrix with its shift into the tiles from the diagonal on, zeros into the others and into the result.
__device__ void prepare(const CholeskyInverse& p, const Workspace& w, double shift) {
  const int64_t count = static_cast<int64_t>(p.n) * p.n;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x; at < count; at += gridDim.x * THREADS) {
    const int row = static_cast<int>(at / p.n), column = static_cast<int>(at % p.n);
    double scaled = 0;
    if (row / SIDE <= column / SIDE) {
      const double scale = scale_of(p, row);
      scaled = element(p, row, column) * scale * scale_of(p, column) + (row == column ? shift : 0.0);
      if (row == column) w.scales[row] = scale;
    }
    w.matrix[at] = scaled;
    p.inverse[at] = 0;
  }
}

// A tile of L^-1 is done: it goes to the result as D L^-T, and the norms of its rows to their place.
__device__ void finish(const CholeskyInverse& p, const Workspace& w, int k, int j, Part done) {
  done.each([&](int row, int column, double x) {
    const int at_row = k * SIDE + row, at_column = j * SIDE + column;
    if (at_row < p.n && at_column < p.n) {
      p.inverse[static_cast<int64_t>(at_column) * p.n + at_row] = w.scales[at_column] * x;
    }
  });
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    double square = done.x[2 * i] * done.x[2 * i] + done.x[2 * i + 1] * done.x[2 * i + 1];
    square += __shfl_xor_sync(ALL, square, 1);
    square += __shfl_xor_sync(ALL, square, 2);
    const int row = k * SIDE + Part::row() + EIGHT * i, group = (j * SIDE + Part::column()) / EIGHT;
    if (row < p.n && threadIdx.x % 4 == 0) {
      w.norms[static_cast<int64_t>(row) * tiles_of(p.n) * (SIDE / EIGHT) + group] = square;
    }
  }
}

// A column c of D R^-1 makes X R^-1 lose orthogonality by the errors of the scaled Gram matrix, shift included, times
// |c|^2. One block.
__device__ void certify(const CholeskyInverse& p, const Workspace& w, double shift, bool failed) {
  const int groups = tiles_of(p.n) * (SIDE / EIGHT);
  bool good = !failed;
  for (int row = threadIdx.x; row < p.n; row += THREADS) {
    double square = 0;
    const double* norms = w.norms + static_cast<int64_t>(row) * groups;
    for (int i = 0; i < (row / SIDE + 1) * (SIDE / EIGHT); ++i) square += norms[i];
    good &= 2 * shift * square <= TOLERANCE;
  }
  good = __syncthreads_and(good);
  if (threadIdx.x == 0) *p.certified = good ? YES : failed ? FAILED : NOT_YET;
}

// tile (i, j) -= (W tile (k, i))' (W tile (k, j)), with both factors in shared memory.
__device__ void update(const CholeskyInverse& p, const Workspace& w, int i, int j, const Tile& left, const Tile& right,
                       Part before) {
  const Part change = product<true>(left, right);
#pragma unroll
  for (int l = 0; l < 4; ++l) before.x[l] -= change.x[l];
  before.each([&](int row, int column, double x) {
    const int at_row = i * SIDE + row, at_column = j * SIDE + column;
    if (at_row < p.n && at_column < p.n) w.matrix[static_cast<int64_t>(at_row) * p.n + at_column] = x;
  });
}

__device__ Part load_part(const CholeskyInverse& p, const Workspace& w, int i, int j) {
  Part part;
#pragma unroll
  for (int l = 0; l < 4; ++l) {
    const int row = i * SIDE + Part::row() + l / 2 * EIGHT, column = j * SIDE + Part::column() + l % 2;
    const bool inside = row < p.n && column < p.n;
    part.x[l] = inside ? w.matrix[static_cast<int64_t>(row) * p.n + column] : row == column ? 1.0 : 0.0;
  }
  return part;
}

__device__ void load_inverse(const Workspace& w, Shared& shared, int k) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = threadIdx.x / 32 + EIGHT * i, column = threadIdx.x % 32;
    shared.inverse[row][column] = w.diagonal[(k * SIDE + row) * SIDE + column];
  }
}

// The next tile on the diagonal through step k, and its W: what every other block waits for.
__device__ void advance_diagonal(const CholeskyInverse& p, const Workspace& w, Shared& shared, int k, int attempt) {
  const int next = k + 1;
  Part tile = load_part(p, w, next, next);
  if (k >= 0) {
    keep(shared.raw, load(p, w.matrix, k, next));
    load_inverse(w, shared, k);
    __syncthreads();
    keep(shared.left, product<false>(shared.inverse, shared.raw));
    __syncthreads();
    const Part change = product<true>(shared.left, shared.left);
#pragma unroll
    for (int l = 0; l < 4; ++l) tile.x[l] -= change.x[l];
  }
  keep(shared.raw, tile);
  __syncthreads();
  invert_diagonal(w, shared, next, attempt);
  __syncthreads();
}

// What else step k changes: all tiles right of and below tile k on the diagonal lose their part along block row k, and
// block row k of L^-1 is done. Tiles are counted row by row, then those of block row k itself; each of `workers` blocks
// takes neighbours.
__device__ void eliminate(const CholeskyInverse& p, const Workspace& w, Shared& shared, int k, int worker,
                          int workers) {
  const int tiles = tiles_of(p.n), below = tiles - k - 1;
  const int updates = below * (k + 1) + below * (below + 1) / 2, all = updates + k + 1;
  const int begin = static_cast<int>(static_cast<int64_t>(all) * worker / workers);
  const int end = static_cast<int>(static_cast<int64_t>(all) * (worker + 1) / workers);
  if (begin == end) return;
  load_inverse(w, shared, k);
  int i = k + 1, before = 0, held = -1;  // tiles of the rows before row i; the row whose factor is in shared.left
  for (int tile = begin; tile < end; ++tile) {
    while (tile < updates && tile >= before + k + 1 + tiles - i) before += k + 1 + tiles - i++;
    const int place = tile < updates ? tile - before : tile - updates;
    const int j = place <= k ? place : i + place - k - 1;
    if (tile < updates && i == k + 1 && j == k + 1) continue;  // advance_diagonal has it
    Part changed;
    if (tile < updates) changed = load_part(p, w, i, j);
    const Four raw = load(p, w.matrix, k, j);
    if (tile < updates && held != i) {
      keep(shared.raw, load(p, w.matrix, k, i));
      __syncthreads();
      const Part left = product<false>(shared.inverse, shared.raw);
      __syncthreads();
      keep(shared.left, left);
      held = i;
    }
    keep(shared.raw, raw);
    __syncthreads();
    Part scaled;
    if (j != k) {
      scaled = product<false>(shared.inverse, shared.raw);
    } else {
      scaled.each([&](int row, int column, double& x) { x = shared.inverse[row][column]; });
    }
    if (tile >= updates) {
      finish(p, w, k, j, scaled);
      __syncthreads();
      continue;
    }
    keep(shared.right, scaled);
    __syncthreads();
    update(p, w, i, j, shared.left, shared.right, changed);
  }
}

__global__ void __launch_bounds__(THREADS, 1) cholesky_kernel(CholeskyInverse p) {
  __shared__ Shared shared;
  const int matrix = p.first + blockIdx.y;
  const int64_t square = static_cast<int64_t>(p.n) * p.n;
  const Workspace w = workspace_of(p, matrix);
  p.gram += matrix * p.parts * square;
  p.inverse += matrix * square;
  p.certified += matrix;
  if (p.before != nullptr && p.before[matrix] != NOT_YET) {
    if (blockIdx.x == 0 && threadIdx.x == 0) *p.certified = p.before[matrix];
    return;
  }
  const int tiles = tiles_of(p.n), others = gridDim.x - 1;
  unsigned barriers = 0;
  bool failed = true;
  for (int attempt = 0; failed && attempt < ATTEMPTS; ++attempt) {
    const double shift = shift_of(p.n, attempt);
    prepare(p, w, shift);
    grid_barrier(w.arrived, barriers);
    if (blockIdx.x == 0) advance_diagonal(p, w, shared, -1, attempt);
    grid_barrier(w.arrived, barriers);
    for (int k = 0; k < tiles; ++k) {
      if (others == 0) {
        eliminate(p, w, shared, k, 0, 1);
      } else if (blockIdx.x > 0) {
        eliminate(p, w, shared, k, blockIdx.x - 1, others);
      }
      __syncthreads();
      if (blockIdx.x == 0 && k + 1 < tiles) advance_diagonal(p, w, shared, k, attempt);
      grid_barrier(w.arrived, barriers);
    }
    failed = w.failed[attempt] != 0;
    if (blockIdx.x == 0) certify(p, w, shift, failed);
  }
}

}  // namespace

int64_t cholesky_workspace(int matrices, int n) {
  return matrices * workspace_size(n) + (static_cast<int64_t>(matrices) * WORDS + 1) / 2;
}

const char* cholesky_inverse(const CholeskyInverse& p, void* stream) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  const char* cleared = status(cudaMemsetAsync(words_of(p), 0, p.matrices * WORDS * sizeof(unsigned), s));
  if (cleared != nullptr) return cleared;
  const int tiles = tiles_of(p.n);
  return launch_cooperatively(cholesky_kernel, p, 1 + tiles * (tiles + 1) / 2, THREADS, s);
}

}  // namespace dalle::cuda
