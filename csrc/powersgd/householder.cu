#include "common/cuda.h"
#include "powersgd/grid.h"
#include "powersgd/powersgd.h"

namespace dalle::cuda {
namespace {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int WIDTH = 32;  // columns of a panel: a lane has one
constexpr int STRIP = 8;   // columns that a block updates at a time
constexpr int TILE = 64;   // rows of V that it holds meanwhile
constexpr int PITCH = WIDTH + 4;  // of those rows: four rows that a warp reads at once lie in different banks
constexpr unsigned ALL = 0xffffffffu;
// Of a column whose largest element was 1 nothing is left but rounding errors if the squares of what is left sum to
// less. Sums of still smaller squares would lose precision, and the reflection its orthogonality.
constexpr float LEAST_SQUARE = 8.271806125530277e-25f;  // 2^-80

struct Workspace {
  float* matrix;   // [rows, columns]: P + eps*I with scaled columns, panel by panel replaced by its vectors V
  float* factors;  // T of each panel, [32, 32]
  float* signs;    // of the diagonal of R
  uint64_t* sums;    // mail: [2, team, 32], one block's part of a column's products with its panel
  uint64_t* pivots;  // mail: [2, 32], the panel's row that a column's reflection begins at
  unsigned* arrived;
};

__host__ __device__ inline int panels_of(int columns) { return (columns + WIDTH - 1) / WIDTH; }

// Blocks that factor a panel of so many rows, each thread holding ROWS of them.
template <int ROWS>
__host__ __device__ inline int team_of(int rows) {
  return (rows + WARPS * ROWS - 1) / (WARPS * ROWS);
}

constexpr int FEW_ROWS = 16, MANY_ROWS = 32;

// Of one matrix, an even number; the mail of all matrices lies behind them.
__host__ __device__ inline int64_t workspace_size(int rows, int columns) {
  const int64_t floats = static_cast<int64_t>(rows) * columns + panels_of(columns) * WIDTH * WIDTH + columns;
  return (floats + 1) / 2 * 2;
}

__host__ __device__ inline int64_t mail_words(int rows) {
  return 2 * WIDTH * (static_cast<int64_t>(team_of<FEW_ROWS>(rows)) + 1) + 1;
}

__host__ __device__ inline uint64_t* mail_of(const Householder& p) {
  return reinterpret_cast<uint64_t*>(p.workspace + p.matrices * workspace_size(p.rows, p.columns));
}

__device__ Workspace workspace_of(const Householder& p, int matrix) {
  Workspace w;
  w.matrix = p.workspace + matrix * workspace_size(p.rows, p.columns);
  w.factors = w.matrix + static_cast<int64_t>(p.rows) * p.columns;
  w.signs = w.factors + panels_of(p.columns) * WIDTH * WIDTH;
  w.sums = mail_of(p) + matrix * mail_words(p.rows);
  w.pivots = w.sums + 2 * WIDTH * static_cast<int64_t>(team_of<FEW_ROWS>(p.rows));
  w.arrived = reinterpret_cast<unsigned*>(w.pivots + 2 * WIDTH);
  return w;
}

struct Shared {
  float tile[2][TILE][PITCH];
  float parts[WARPS][WIDTH][STRIP];
  float products[WIDTH][WIDTH + 1];
  float factor[WIDTH][WIDTH + 1];
  float sums[WARPS][WIDTH];
  float all_sums[WARPS][WIDTH];
  float pivot[WIDTH];
  float taus[WIDTH];
};

// matrix = (P + eps*I) D and out = I, a strip at a time. D are powers of two that give every column a largest element
// between 1 and 2: Q stays the same, and no square overflows or vanishes.
__device__ void prepare(const Householder& p, const Workspace& w, Shared& shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, q = lane % STRIP;
  constexpr int AT_ONCE = THREADS / STRIP;
  for (int begin = blockIdx.x * STRIP; begin < p.columns; begin += gridDim.x * STRIP) {
    const int column = begin + q;
    const bool inside = column < p.columns;
    float most = 0;
    for (int row = threadIdx.x / STRIP; inside && row < p.rows; row += AT_ONCE) {
      const float x = p.input[static_cast<int64_t>(row) * p.columns + column] + (row == column ? p.eps : 0.f);
      most = fmaxf(most, fabsf(x));
    }
    most = fmaxf(most, __shfl_xor_sync(ALL, most, 8));
    most = fmaxf(most, __shfl_xor_sync(ALL, most, 16));
    __syncthreads();
    if (lane < STRIP) shared.sums[warp][q] = most;
    __syncthreads();
    for (int i = 0; i < WARPS; ++i) most = fmaxf(most, shared.sums[i][q]);
    int exponent = most > 0 && most < INFINITY ? ilogbf(most) : 0;
    exponent = exponent > 126 ? 126 : exponent < -126 ? -126 : exponent;
    const float scale = scalbnf(1.f, -exponent);
    for (int row = threadIdx.x / STRIP; inside && row < p.rows; row += AT_ONCE) {
      const int64_t at = static_cast<int64_t>(row) * p.columns + column;
      w.matrix[at] = (p.input[at] + (row == column ? p.eps : 0.f)) * scale;
      p.out[at] = row == column ? 1.f : 0.f;
    }
  }
}

// T of a panel from the products v_k . v_j and the taus: row i needs only itself, so a lane makes one. One warp.
__device__ void make_factor(Shared& shared, int width, float* factor) {
  const int i = threadIdx.x % 32;
  __syncwarp();
  for (int j = 0; j < WIDTH; ++j) {
    float sum = 0;
    for (int l = i; l < j; ++l) sum += shared.factor[i][l] * shared.products[l][j];
    const float tau = j < width ? shared.taus[j] : 0.f;
    shared.factor[i][j] = i < j ? -tau * sum : i == j ? tau : 0.f;
  }
  __syncwarp();
  for (int row = 0; row < WIDTH; ++row) factor[row * WIDTH + i] = shared.factor[row][i];
}

// The warp's share of the sums that the team's blocks have posted, and the pivot row: a lane's column. The boxes are
// read many at once, since one read takes as long as all the rest of a step.
__device__ float received_sum(const uint64_t* sums, const uint64_t* pivots, int team, unsigned step, float& pivot) {
  constexpr int AT_ONCE = 8;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float sum = 0;
  for (bool all = false; !all;) {
    all = receive(pivots + lane, step, pivot);
    sum = 0;
    for (int first = warp; first < team; first += AT_ONCE * WARPS) {
      float values[AT_ONCE];
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        const int block = first + i * WARPS;
        values[i] = 0;
        if (block < team) all &= receive(sums + block * WIDTH + lane, step, values[i]);
      }
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) sum += values[i];
    }
    if (!all) __nanosleep(20);
  }
  return sum;
}

// The reflections of a panel's columns, whose vectors v (1 at their head) take the columns' places. A warp holds ROWS
// rows in registers, a lane one column. A column x costs one exchange between blocks: of its products z with all
// columns of the panel, from which both its norm and, by v = (x - beta e) / (alpha - beta), the products with v follow.
template <int ROWS>
__device__ void factor_panel(const Householder& p, const Workspace& w, Shared& shared, int first) {
  const int team = team_of<ROWS>(p.rows - first);
  if (static_cast<int>(blockIdx.x) >= team) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int width = min(WIDTH, p.columns - first);
  const int row0 = first + (blockIdx.x * WARPS + warp) * ROWS;
  float a[ROWS], z = 0;
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const bool inside = row0 + r < p.rows && lane < width;
    a[r] = inside ? w.matrix[static_cast<int64_t>(row0 + r) * p.columns + first + lane] : 0.f;
    z += __shfl_sync(ALL, a[r], 0) * a[r];
  }
  for (int j = 0; j < width; ++j) {
    const unsigned step = first + j + 1;
    const int parity = step % 2;
    uint64_t* const sums = w.sums + static_cast<int64_t>(parity) * team * WIDTH;
    uint64_t* const pivots = w.pivots + parity * WIDTH;

    shared.sums[warp][lane] = z;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      if (row0 + r == first + j) shared.pivot[lane] = a[r];
    }
    __syncthreads();
    if (warp == 0) {
      float sum = 0;
      for (int i = 0; i < WARPS; ++i) sum += shared.sums[i][lane];
      post(sums + blockIdx.x * WIDTH + lane, sum, step);
      if (blockIdx.x == 0) post(pivots + lane, shared.pivot[lane], step);
    }
    float pivot;
    shared.all_sums[warp][lane] = received_sum(sums, pivots, team, step, pivot);
    __syncthreads();
    z = 0;
    for (int i = 0; i < WARPS; ++i) z += shared.all_sums[i][lane];

    const float alpha = __shfl_sync(ALL, pivot, j), square = __shfl_sync(ALL, z, j);
    const float beta = -copysignf(sqrtf(square), alpha);
    const bool nothing = square < LEAST_SQUARE;
    const float tau = nothing ? 0.f : (beta - alpha) / beta;
    const float inverse = nothing ? 0.f : 1 / (alpha - beta);
    const float product = pivot + inverse * (z - alpha * pivot);  // v_j with the lane's column
    if (blockIdx.x == 0 && warp == 0) {
      shared.products[lane][j] = product;
      if (lane == 0) {
        shared.taus[j] = tau;
        w.signs[first + j] = !nothing && beta < 0 ? -1.f : 1.f;
      }
    }
    z = 0;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int row = row0 + r - first;
      const float x = __shfl_sync(ALL, a[r], j);
      const float v = row > j ? x * inverse : row == j ? 1.f : 0.f;
      if (lane > j) a[r] -= v * tau * product;
      if (lane == j) a[r] = v;
      const float next = __shfl_sync(ALL, a[r], (j + 1) % WIDTH);
      if (row > j) z += next * a[r];
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    if (row0 + r < p.rows && lane < width) {
      w.matrix[static_cast<int64_t>(row0 + r) * p.columns + first + lane] = row0 + r - first < lane ? 0.f : a[r];
    }
  }
  if (blockIdx.x == 0 && warp == 0) make_factor(shared, width, w.factors + first * WIDTH);
}

// The rows of a panel's V from `row` on, on their way to shared memory: eight a warp, an element of each a lane.
struct Fetched {
  float values[TILE / WARPS];

  __device__ void load(const float* v, int row, int rows, int pitch, int width) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < TILE / WARPS; ++i) {
      const int at = row + warp + i * WARPS;
      values[i] = at < rows && lane < width ? v[static_cast<int64_t>(at) * pitch + lane] : 0.f;
    }
  }

  __device__ void store(float (&tile)[TILE][PITCH]) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < TILE / WARPS; ++i) tile[warp + i * WARPS][lane] = values[i];
  }
};

// Calls use(row, tile row) for all rows of a panel from `first` on, while the next rows of V are on their way. A thread
// has one column of the strip and every fourth row of its warp's.
template <class Use>
__device__ void each_row(const Householder& p, const Workspace& w, Shared& shared, int first, int width, Use use) {
  const float* v = w.matrix + first;
  const int base = threadIdx.x / 32 * (TILE / WARPS) + threadIdx.x % 32 / STRIP;
  Fetched fetched;
  fetched.load(v, first, p.rows, p.columns, width);
  int buffer = 0;
  for (int row = first; row < p.rows; row += TILE, buffer ^= 1) {
    fetched.store(shared.tile[buffer]);
    __syncthreads();
    fetched.load(v, row + TILE, p.rows, p.columns, width);
#pragma unroll
    for (int i = base; i < base + TILE / WARPS; i += 32 / STRIP) {
      if (row + i < p.rows) use(row + i, shared.tile[buffer][i]);
    }
  }
}

// target -= V T V' target, or with T' for T, on a strip of columns of a matrix like P, times `scale` of the column.
__device__ void reflect_strip(const Householder& p, const Workspace& w, Shared& shared, int first, bool transposed,
                              float* target, int begin, float scale) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, q = lane % STRIP;
  const int width = min(WIDTH, p.columns - first), column = begin + q;
  const bool inside = column < p.columns;
  const int64_t pitch = p.columns;
  float sums[WIDTH];
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) sums[i] = 0;
  each_row(p, w, shared, first, width, [&](int row, const float* v) {
    const float x = inside ? target[row * pitch + column] : 0.f;
#pragma unroll
    for (int i = 0; i < WIDTH; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(v + i);
      sums[i] += four.x * x;
      sums[i + 1] += four.y * x;
      sums[i + 2] += four.z * x;
      sums[i + 3] += four.w * x;
    }
  });
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) {
    sums[i] += __shfl_xor_sync(ALL, sums[i], 8);
    sums[i] += __shfl_xor_sync(ALL, sums[i], 16);
    if (lane < STRIP) shared.parts[warp][i][q] = sums[i];
  }
  __syncthreads();
  const int mine = threadIdx.x / STRIP, its = threadIdx.x % STRIP;  // an element of V' target
  float sum = 0;
  for (int i = 0; i < WARPS; ++i) sum += shared.parts[i][mine][its];
  shared.products[mine][its] = sum;
  __syncthreads();
  const float* factor = w.factors + first * WIDTH;
  sum = 0;
  for (int i = 0; i < WIDTH; ++i) {
    sum += factor[transposed ? i * WIDTH + mine : mine * WIDTH + i] * shared.products[i][its];
  }
  shared.parts[0][mine][its] = sum;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) sums[i] = shared.parts[0][i][q];
  each_row(p, w, shared, first, width, [&](int row, const float* v) {
    float change = 0;
#pragma unroll
    for (int i = 0; i < WIDTH; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(v + i);
      change += four.x * sums[i] + four.y * sums[i + 1] + four.z * sums[i + 2] + four.w * sums[i + 3];
    }
    if (inside) target[row * pitch + column] = (target[row * pitch + column] - change) * scale;
  });
  __syncthreads();
}

template <int ROWS>
__global__ void __launch_bounds__(THREADS, 1) householder_kernel(Householder p) {
  __shared__ Shared shared;
  const int matrix = p.first + blockIdx.y;
  const int64_t size = static_cast<int64_t>(p.rows) * p.columns;
  if (p.certified != nullptr && p.certified[matrix] == 1) return;
  const Workspace w = workspace_of(p, matrix);
  p.input += matrix * size;
  p.out += matrix * size;
  unsigned barriers = 0;
  prepare(p, w, shared);
  grid_barrier(w.arrived, barriers);
  for (int first = 0; first < p.columns; first += WIDTH) {
    factor_panel<ROWS>(p, w, shared, first);
    grid_barrier(w.arrived, barriers);
    const int rest = first + WIDTH;
    if (rest >= p.columns) break;
    for (int begin = rest + blockIdx.x * STRIP; begin < p.columns; begin += gridDim.x * STRIP) {
      reflect_strip(p, w, shared, first, true, w.matrix, begin, 1.f);
    }
    grid_barrier(w.arrived, barriers);
  }
  // Q = H_1 ... H_n I: the last panel that changes a column of I is its own. Columns need nothing of each other.
  for (int begin = blockIdx.x * STRIP; begin < p.columns; begin += gridDim.x * STRIP) {
    const int column = begin + threadIdx.x % STRIP;
    const float sign = column < p.columns ? w.signs[column] : 1.f;
    for (int first = begin / WIDTH * WIDTH; first >= 0; first -= WIDTH) {
      reflect_strip(p, w, shared, first, false, p.out, begin, first == 0 ? sign : 1.f);
    }
  }
}

template <int ROWS>
const char* launch_householder(const Householder& p, cudaStream_t stream) {
  const int strips = (p.columns + STRIP - 1) / STRIP, team = team_of<ROWS>(p.rows);
  return launch_cooperatively(householder_kernel<ROWS>, p, strips > team ? strips : team, THREADS, stream);
}

template <int ROWS>
int most_rows() {
  int blocks = 0;
  const cudaError_t error = blocks_at_once(householder_kernel<ROWS>, THREADS, blocks);
  return error == cudaSuccess ? blocks * WARPS * ROWS : 0;
}

}  // namespace

int64_t householder_workspace(int matrices, int rows, int columns) {
  return matrices * (workspace_size(rows, columns) + 2 * mail_words(rows));
}

int householder_most_rows() { return most_rows<MANY_ROWS>(); }

const char* householder(const Householder& p, void* stream) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  const int64_t words = p.matrices * mail_words(p.rows);
  const char* cleared = status(cudaMemsetAsync(mail_of(p), 0, words * sizeof(uint64_t), s));
  if (cleared != nullptr) return cleared;
  return p.rows <= most_rows<FEW_ROWS>() ? launch_householder<FEW_ROWS>(p, s) : launch_householder<MANY_ROWS>(p, s);
}

}  // namespace dalle::cuda
