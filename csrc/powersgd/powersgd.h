// Family powersgd: an orthonormal basis Q of the columns of P + eps*I, the linear algebra of PowerSGD (arXiv
// 2102.12092, App. E). Only CUDA has kernels of its own; on a CPU LAPACK is near the peak of the matrix product.
//
// Q is that of the QR decomposition whose R has no negative number on its diagonal. Two algorithms give it; a matrix is
// row-major and contiguous throughout, rows m >= columns n.
//
// Cholesky QR in float64. The Gram matrix G = X'X of X = P + eps*I is summed in float64, which Hopper's tensor cores
// multiply as fast as its other units do float32; `cholesky_inverse` finds R^-1 with R'R = G, and Q = X R^-1. This
// loses orthogonality as condition^2 times 1e-16, so that up to a condition of some hundred once is enough, which the
// kernel certifies by a bound; else the same is done to Q. A small shift keeps the first decomposition from failing.
//
// Householder in float32, for whatever is left: `householder` is one cooperative launch that reads on the device
// whether it is needed at all. Its panels of 32 columns are factored by a team of blocks that hold them in registers
// and exchange one row of sums a column; the rest follows as products with I - V T V'. It serves any finite matrix, and
// passes NaN on.
//
// Floor: 2mn^2 operations a pass, the symmetric and triangular halves counted once; 3968 x 896 is 6.4e9, 106 us of an
// H200 at 60 TFLOP/s in float64. Householder takes 4mn^2 - 4n^3/3, 11.8e9.
//
// Reached on an H200 (CUDA 13.0, torch 2.11; medians in ms; one matrix of normal numbers; the whole call in a CUDA
// graph, whose kernels of the second pass and of Householder end at once; a condition of 1e6 takes both passes;
// `householder` alone, which as a fallback need only be right):
//
//                    3968x112  3968x512  3968x896  15872x512  15872x896  16384x1024
//   torch.linalg.qr     0.762      3.74      6.68       7.98       14.8        24.3
//   the call, graph     0.082     0.257     0.505      0.466       1.07        1.41
//     gram              0.033     0.069     0.144      0.182       0.452       0.625
//     cholesky_inverse  0.060     0.184     0.295      0.180       0.285       0.326
//     apply             0.026     0.067     0.127      0.165       0.380       0.494
//   condition of 1e6    0.154     0.594      1.25      0.975       2.29        3.02
//   householder          1.10      4.62      7.84       16.9       35.8        42.7
#pragma once

#include <cstdint>

namespace dalle {

// In the second pass `before` is what the first one certified of each matrix: where that is not 0 nothing is done, at
// once. In the first pass it is nullptr.

// The Gram matrix of P + eps*I as a sum of parts, each over some of the rows. Of a part only what lies on the diagonal
// and above is written, in tiles of 64.
struct Gram {
  const float* input;  // [matrices, rows, columns]
  double* out;         // [matrices, parts, columns, columns]
  const int* before;   // [matrices]
  int matrices, rows, columns, parts;
  double eps;
};

// inverse = R^-1, upper triangular, zeros below, with R'R = gram (+ a shift of its diagonal, 8 sqrt(n) 2^-53 at first).
// certified becomes 1 if X R^-1 is orthonormal to float32's accuracy for the X whose Gram matrix this is; else 0, or -1
// where there is no such R.
struct CholeskyInverse {
  const double* gram;  // [matrices, parts, n, n], as Gram leaves it
  double* inverse;     // [matrices, n, n]
  double* workspace;   // cholesky_workspace(matrices, n) doubles, of any content
  const int* before;   // [matrices]
  int* certified;      // [matrices]: as before where that is not 0
  int matrices, n, parts;
  int first = 0;  // of the matrices that a launch is for
};

// out = (input + eps*I) inverse, rounded to float32; may be in place.
struct Apply {
  const float* input;     // [matrices, rows, columns]
  const double* inverse;  // [matrices, columns, columns], upper triangular
  float* out;             // [matrices, rows, columns]
  const int* before;      // [matrices]
  int matrices, rows, columns;
  double eps;
};

// out = Q for any finite P, unless certified says that out holds it already; certified may be nullptr.
struct Householder {
  const float* input;  // P, [matrices, rows, columns]
  float* out;          // Q, [matrices, rows, columns]
  float* workspace;    // householder_workspace(matrices, rows, columns) floats, of any content
  const int* certified;  // [matrices]
  int matrices, rows, columns;
  float eps;
  int first = 0;  // of the matrices that a launch is for
};

namespace cuda {
// Into how many parts a Gram matrix is best split.
int gram_parts(int matrices, int rows, int columns);
int64_t cholesky_workspace(int matrices, int n);
int64_t householder_workspace(int matrices, int rows, int columns);
// Rows that `householder` takes at most on the current device.
int householder_most_rows();

const char* gram(const Gram&, void* stream);
const char* cholesky_inverse(const CholeskyInverse&, void* stream);
const char* apply(const Apply&, void* stream);
const char* householder(const Householder&, void* stream);
}  // namespace cuda

}  // namespace dalle
