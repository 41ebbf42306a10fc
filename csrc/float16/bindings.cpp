#include "common/module.h"
#include "float16/float16.h"

using namespace dalle;
using namespace pybind11::literals;

DALLE_BINDINGS(float16, m) {
  m.def(
      "float16_encode",
      [](uintptr_t input, int dtype, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
         uintptr_t codes, uintptr_t nonfinite, int format, uintptr_t executor) {
        const Float16Encode params{pointer<const void>(input),  Dtype{dtype},         strided(sizes, strides),
                                   pointer<uint16_t>(codes),    pointer<uint8_t>(nonfinite),
                                   Float16Format{format},       threads_of(executor)};
        DALLE_RUN(float16_encode, params, executor);
      },
      "input"_a, "dtype"_a, "sizes"_a, "strides"_a, "codes"_a, "nonfinite"_a, "format"_a, "executor"_a);
  m.def(
      "float16_decode",
      [](uintptr_t codes, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, uintptr_t output,
         int dtype, int format, uintptr_t executor) {
        const Float16Decode params{pointer<const uint16_t>(codes), strided(sizes, strides), pointer<void>(output),
                                   Dtype{dtype}, Float16Format{format}, threads_of(executor)};
        DALLE_RUN(float16_decode, params, executor);
      },
      "codes"_a, "sizes"_a, "strides"_a, "output"_a, "dtype"_a, "format"_a, "executor"_a);
}
