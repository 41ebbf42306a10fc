#include "common/module.h"
#include "powersgd/powersgd.h"

using namespace dalle;
using namespace pybind11::literals;

DALLE_BINDINGS(powersgd, m) {
  m.def("gram_parts", &cuda::gram_parts, "matrices"_a, "rows"_a, "columns"_a);
  m.def("cholesky_workspace", &cuda::cholesky_workspace, "matrices"_a, "n"_a);
  m.def("householder_workspace", &cuda::householder_workspace, "matrices"_a, "rows"_a, "columns"_a);
  m.def("householder_most_rows", &cuda::householder_most_rows);
  m.def(
      "gram",
      [](uintptr_t input, uintptr_t out, uintptr_t before, int matrices, int rows, int columns, int parts, double eps,
         uintptr_t executor) {
        const Gram params{pointer<const float>(input), pointer<double>(out), pointer<const int>(before),
                          matrices, rows, columns, parts, eps};
        DALLE_RUN(gram, params, executor);
      },
      "input"_a, "out"_a, "before"_a, "matrices"_a, "rows"_a, "columns"_a, "parts"_a, "eps"_a, "executor"_a);
  m.def(
      "cholesky_inverse",
      [](uintptr_t gram, uintptr_t inverse, uintptr_t workspace, uintptr_t before, uintptr_t certified,
         int matrices, int n, int parts, uintptr_t executor) {
        const CholeskyInverse params{pointer<const double>(gram), pointer<double>(inverse), pointer<double>(workspace),
                                     pointer<const int>(before),  pointer<int>(certified),  matrices,
                                     n,                           parts};
        DALLE_RUN(cholesky_inverse, params, executor);
      },
      "gram"_a, "inverse"_a, "workspace"_a, "before"_a, "certified"_a, "matrices"_a, "n"_a, "parts"_a,
      "executor"_a);
  m.def(
      "apply",
      [](uintptr_t input, uintptr_t inverse, uintptr_t out, uintptr_t before, int matrices, int rows, int columns,
         double eps, uintptr_t executor) {
        const Apply params{pointer<const float>(input), pointer<const double>(inverse), pointer<float>(out),
                           pointer<const int>(before), matrices, rows, columns, eps};
        DALLE_RUN(apply, params, executor);
      },
      "input"_a, "inverse"_a, "out"_a, "before"_a, "matrices"_a, "rows"_a, "columns"_a, "eps"_a, "executor"_a);
  m.def(
      "householder",
      [](uintptr_t input, uintptr_t out, uintptr_t workspace, uintptr_t certified, int matrices, int rows,
         int columns, float eps, uintptr_t executor) {
        const Householder params{pointer<const float>(input),   pointer<float>(out), pointer<float>(workspace),
                                 pointer<const int>(certified), matrices,            rows,
                                 columns,                       eps};
        DALLE_RUN(householder, params, executor);
      },
      "input"_a, "out"_a, "workspace"_a, "certified"_a, "matrices"_a, "rows"_a, "columns"_a, "eps"_a,
      "executor"_a);
}
