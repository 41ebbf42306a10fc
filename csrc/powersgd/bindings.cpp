#include "common/module.h"
#include "powersgd/powersgd.h"

using namespace dalle;
using namespace pybind11::literals;

DALLE_BINDINGS(m) {
  m.def("cholesky_workspace", &cuda::cholesky_workspace, "n"_a);
  m.def("householder_workspace", &cuda::householder_workspace, "rows"_a, "columns"_a);
  m.def("householder_most_rows", &cuda::householder_most_rows);
  m.def("has_fast_float64", &cuda::has_fast_float64);
  m.def(
      "cholesky_inverse",
      [](uintptr_t gram, uintptr_t inverse, uintptr_t workspace, uintptr_t certified, bool again, int n,
         uintptr_t executor) {
        const CholeskyInverse params{pointer<const double>(gram), pointer<double>(inverse), pointer<double>(workspace),
                                     pointer<int>(certified),     again,                    n};
        DALLE_RUN(cholesky_inverse, params, executor);
      },
      "gram"_a, "inverse"_a, "workspace"_a, "certified"_a, "again"_a, "n"_a, "executor"_a);
  m.def(
      "householder",
      [](uintptr_t input, uintptr_t out, uintptr_t workspace, uintptr_t certified, int rows, int columns, float eps,
         uintptr_t executor) {
        const Householder params{pointer<const float>(input),   pointer<float>(out), pointer<float>(workspace),
                                 pointer<const int>(certified), rows,                columns, eps};
        DALLE_RUN(householder, params, executor);
      },
      "input"_a, "out"_a, "workspace"_a, "certified"_a, "rows"_a, "columns"_a, "eps"_a, "executor"_a);
}
