#include "common/cuda.h"
#include "powersgd/grid.h"
#include "powersgd/powersgd.h"

namespace dalle::cuda {
namespace {

constexpr int THREADS = 256;
constexpr int SIDE = 32;  // of a tile; a thread has four neighbours of one row of it
constexpr int FOUR = 4;
constexpr unsigned ALL = 0xffffffffu;
constexpr double UNIT = 1.1102230246251565e-16;  // 2^-53
constexpr double TOLERANCE = 2.98023223876953125e-8;  // 2^-25: a loss of orthogonality below float32's own
constexpr int PITCH = SIDE + FOUR;  // of a tile's rows: those that a warp reads at once lie in different banks

constexpr int ATTEMPTS = 2;

// What *certified says.
constexpr int NOT_YET = 0, YES = 1, FAILED = -1;

// The matrix that the elimination works on holds in its tiles above the diagonal and on it what is left of the scaled
// Gram matrix, and below it what is so far of L^-1.
struct Workspace {
  double* matrix;  // [n, n]
  double* scales;  // d_i = gram_ii^-1/2: D gram D has a diagonal of ones, whose condition alone counts
  double* norms;   // [n, tiles], of the rows of L^-1 within a tile, squared
  unsigned* arrived;
  int* failed;     // for each attempt
};

__host__ __device__ inline int tiles_of(int n) { return (n + SIDE - 1) / SIDE; }

__host__ __device__ inline Workspace workspace_of(const CholeskyInverse& p) {
  const int64_t n = p.n, tiles = tiles_of(p.n);
  Workspace w;
  w.matrix = p.workspace;
  w.scales = w.matrix + n * n;
  w.norms = w.scales + n;
  w.arrived = reinterpret_cast<unsigned*>(w.norms + n * tiles);
  w.failed = reinterpret_cast<int*>(w.arrived + 1);
  return w;
}

struct alignas(32) Four {
  double x[FOUR];
};

using Tile = double[SIDE][PITCH];

struct Shared {
  Tile inverse;  // of the Cholesky factor L of the tile on the diagonal
  Tile raw;
  union {
    struct {
      Tile left, right;
    };
    double pivot_rows[SIDE][2 * SIDE];
  };
};

__device__ int row_of_thread() { return threadIdx.x / (SIDE / FOUR); }
__device__ int column_of_thread() { return threadIdx.x % (SIDE / FOUR) * FOUR; }

// The thread's part of a tile; outside of the matrix it continues as the identity.
__device__ Four load(const double* matrix, int n, int i, int j) {
  const int row = i * SIDE + row_of_thread(), column = j * SIDE + column_of_thread();
  Four four;
#pragma unroll
  for (int k = 0; k < FOUR; ++k) {
    const bool inside = row < n && column + k < n;
    four.x[k] = inside ? matrix[static_cast<int64_t>(row) * n + column + k] : row == column + k ? 1.0 : 0.0;
  }
  return four;
}

__device__ void store(double* matrix, int n, int i, int j, const Four& four) {
  const int row = i * SIDE + row_of_thread(), column = j * SIDE + column_of_thread();
#pragma unroll
  for (int k = 0; k < FOUR; ++k) {
    if (row < n && column + k < n) matrix[static_cast<int64_t>(row) * n + column + k] = four.x[k];
  }
}

__device__ void keep(Tile& tile, const Four& four) {
  *reinterpret_cast<Four*>(&tile[row_of_thread()][column_of_thread()]) = four;
}

// The thread's part of a' b, or of a b where a is lower triangular.
template <bool TRANSPOSED>
__device__ Four product(const Tile& a, const Tile& b) {
  const int row = row_of_thread(), column = column_of_thread();
  Four sum = {};
#pragma unroll 8
  for (int l = 0; l < SIDE; ++l) {
    const double x = TRANSPOSED ? a[l][row] : a[row][l];
    const Four y = *reinterpret_cast<const Four*>(&b[l][column]);
#pragma unroll
    for (int k = 0; k < FOUR; ++k) sum.x[k] += x * y.x[k];
  }
  return sum;
}

// shared.inverse = L^-1 of tile k on the diagonal: elimination on [tile | I], whose scaled row c is pivot_rows[c]. A
// thread has eight neighbours of one row. Returns whether a pivot was not positive; it is then taken for 1.
__device__ bool invert_diagonal(const double* matrix, int n, int k, Shared& shared) {
  constexpr int EIGHT = 8;
  const int row = threadIdx.x / EIGHT, group = threadIdx.x % EIGHT, lane = threadIdx.x % 32;
  double x[EIGHT];
#pragma unroll
  for (int i = 0; i < EIGHT; ++i) {
    const int column = group * EIGHT + i, at_row = k * SIDE + row, at_column = k * SIDE + column;
    const bool inside = column < SIDE && at_row < n && at_column < n;
    x[i] = inside ? matrix[static_cast<int64_t>(at_row) * n + at_column] : row == column % SIDE ? 1.0 : 0.0;
  }
  bool failed = false;
  for (int outer = 0; outer < SIDE / EIGHT; ++outer) {
#pragma unroll
    for (int inner = 0; inner < EIGHT; ++inner) {
      const int c = outer * EIGHT + inner;
      // Column c of the thread's row; in the rows of the pivot's warp also the pivot.
      const double own = __shfl_sync(ALL, x[inner], lane / EIGHT * EIGHT + outer);
      if (row == c) {
        const bool positive = own > 0;
        failed |= !positive;
        const double scale = positive ? rsqrt(own) : 1.0;
#pragma unroll
        for (int i = 0; i < EIGHT; ++i) shared.pivot_rows[c][group * EIGHT + i] = x[i] * scale;
      }
      __syncthreads();
      if (row > c) {
        // Below the diagonal column c of the tile mirrors row c.
        const double factor = shared.pivot_rows[c][row];
#pragma unroll
        for (int i = 0; i < EIGHT; ++i) x[i] -= factor * shared.pivot_rows[c][group * EIGHT + i];
      }
    }
  }
  for (int i = threadIdx.x; i < SIDE * SIDE; i += THREADS) {
    shared.inverse[i / SIDE][i % SIDE] = shared.pivot_rows[i / SIDE][SIDE + i % SIDE];
  }
  return __syncthreads_or(failed);
}

// As large as the rounding errors of the scaled Gram matrix, so that its decomposition succeeds; of a matrix that misses
// most of its rank they grow on the way, and a second attempt takes a shift that covers that.
__device__ double shift_of(int n, int attempt) {
  return UNIT * (attempt == 0 ? 8 * sqrt(static_cast<double>(n)) : 64.0 * n);
}

// The scaled Gram matrix with its shift into the tiles from the diagonal on, zeros into the others and into the result.
__device__ void prepare(const CholeskyInverse& p, const Workspace& w, double shift) {
  const int64_t count = static_cast<int64_t>(p.n) * p.n;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x; at < count; at += gridDim.x * THREADS) {
    const int row = static_cast<int>(at / p.n), column = static_cast<int>(at % p.n);
    const double in_row = p.gram[static_cast<int64_t>(row) * p.n + row];
    const double in_column = p.gram[static_cast<int64_t>(column) * p.n + column];
    const double row_scale = in_row > 0 ? rsqrt(in_row) : 1.0, column_scale = in_column > 0 ? rsqrt(in_column) : 1.0;
    const double scaled = p.gram[at] * row_scale * column_scale;
    w.matrix[at] = row / SIDE > column / SIDE ? 0.0 : row == column ? scaled + shift : scaled;
    p.inverse[at] = 0;
    if (row == column) w.scales[row] = row_scale;
  }
}

// A tile of L^-1 is done: it goes to the result as D L^-T, and the norms of its rows to their place.
__device__ void finish(const CholeskyInverse& p, const Workspace& w, int k, int j, const Four& done) {
  const int row = k * SIDE + row_of_thread(), column = j * SIDE + column_of_thread();
  double square = 0;
#pragma unroll
  for (int l = 0; l < FOUR; ++l) {
    square += done.x[l] * done.x[l];
    if (row < p.n && column + l < p.n) {
      p.inverse[static_cast<int64_t>(column + l) * p.n + row] = w.scales[column + l] * done.x[l];
    }
  }
  for (int distance = 1; distance < SIDE / FOUR; distance *= 2) square += __shfl_xor_sync(ALL, square, distance);
  if (row < p.n && column_of_thread() == 0) w.norms[static_cast<int64_t>(row) * tiles_of(p.n) + j] = square;
}

// A column c of D R^-1 makes X R^-1 lose orthogonality by the errors of the scaled Gram matrix, shift included, times
// |c|^2. One block.
__device__ void certify(const CholeskyInverse& p, const Workspace& w, double shift, bool failed) {
  const int tiles = tiles_of(p.n);
  bool good = !failed;
  for (int row = threadIdx.x; row < p.n; row += THREADS) {
    double square = 0;
    for (int j = 0; j <= row / SIDE; ++j) square += w.norms[static_cast<int64_t>(row) * tiles + j];
    good &= 2 * shift * square <= TOLERANCE;
  }
  good = __syncthreads_and(good);
  if (threadIdx.x == 0) *p.certified = good ? YES : failed ? FAILED : NOT_YET;
}

// One step: everything right of and below tile k on the diagonal loses its part along block row k, and block row k of
// L^-1 is done. Tiles are counted row by row, then those of block row k itself.
__device__ void eliminate(const CholeskyInverse& p, const Workspace& w, Shared& shared, int k, int attempt) {
  const int tiles = tiles_of(p.n), below = tiles - k - 1;
  const bool failed = invert_diagonal(w.matrix, p.n, k, shared);
  if (failed && blockIdx.x == 0 && threadIdx.x == 0) w.failed[attempt] = 1;
  const int updates = below * (k + 1) + below * (below + 1) / 2, all = updates + k + 1;
  const int begin = static_cast<int>(static_cast<int64_t>(all) * blockIdx.x / gridDim.x);
  const int end = static_cast<int>(static_cast<int64_t>(all) * (blockIdx.x + 1) / gridDim.x);
  int i = k + 1, before = 0, held = -1;  // tiles of the rows before row i; the row whose left factor is in shared.left
  for (int tile = begin; tile < end; ++tile) {
    while (tile < updates && tile >= before + k + 1 + tiles - i) before += k + 1 + tiles - i++;
    const int place = tile < updates ? tile - before : tile - updates;
    const int j = place <= k ? place : i + place - k - 1;
    if (tile < updates && held != i) {
      keep(shared.raw, load(w.matrix, p.n, k, i));
      __syncthreads();
      keep(shared.left, product<false>(shared.inverse, shared.raw));
      held = i;
      __syncthreads();
    }
    Four scaled;
    if (j != k) {
      keep(shared.raw, load(w.matrix, p.n, k, j));
      __syncthreads();
      scaled = product<false>(shared.inverse, shared.raw);
    } else {
      scaled = *reinterpret_cast<const Four*>(&shared.inverse[row_of_thread()][column_of_thread()]);
    }
    if (tile < updates) {
      Four left = load(w.matrix, p.n, i, j);
      keep(shared.right, scaled);
      __syncthreads();
      const Four change = product<true>(shared.left, shared.right);
#pragma unroll
      for (int l = 0; l < FOUR; ++l) left.x[l] -= change.x[l];
      store(w.matrix, p.n, i, j, left);
    } else {
      finish(p, w, k, j, scaled);
    }
    __syncthreads();
  }
}

__global__ void __launch_bounds__(THREADS, 2) cholesky_kernel(CholeskyInverse p) {
  __shared__ Shared shared;
  const Workspace w = workspace_of(p);
  if (p.again && *p.certified != NOT_YET) {
    const int64_t count = static_cast<int64_t>(p.n) * p.n;
    for (int64_t at = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x; at < count; at += gridDim.x * THREADS) {
      p.inverse[at] = at / p.n == at % p.n ? 1.0 : 0.0;
    }
    return;
  }
  unsigned barriers = 0;
  bool failed = true;
  for (int attempt = 0; failed && attempt < ATTEMPTS; ++attempt) {
    const double shift = shift_of(p.n, attempt);
    prepare(p, w, shift);
    for (int k = 0; k < tiles_of(p.n); ++k) {
      grid_barrier(w.arrived, barriers);
      eliminate(p, w, shared, k, attempt);
    }
    grid_barrier(w.arrived, barriers);
    failed = w.failed[attempt] != 0;
    if (blockIdx.x == 0) certify(p, w, shift, failed);
  }
}

}  // namespace

int64_t cholesky_workspace(int n) {
  const int64_t size = n;
  return size * size + size + size * tiles_of(n) + (1 + ATTEMPTS + 1) / 2;
}

bool has_fast_float64() {
  int device = 0, ratio = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&ratio, cudaDevAttrSingleToDoublePrecisionPerfRatio, device) == cudaSuccess && ratio <= 2;
}

const char* cholesky_inverse(const CholeskyInverse& p, void* stream) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  const char* cleared = status(cudaMemsetAsync(workspace_of(p).arrived, 0, (1 + ATTEMPTS) * sizeof(int), s));
  if (cleared != nullptr) return cleared;
  const int tiles = tiles_of(p.n);
  int blocks = 0;
  const cudaError_t error = cooperative_blocks(cholesky_kernel, THREADS, tiles * (tiles + 1) / 2, blocks);
  return error != cudaSuccess ? status(error) : launch_cooperatively(cholesky_kernel, p, blocks, THREADS, s);
}

}  // namespace dalle::cuda
