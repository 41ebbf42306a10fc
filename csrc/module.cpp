// The Python module dalle_kernels._cpu: addresses, sizes and strides in, status out (as an exception).
//
// Nothing here checks tensors: dalle_kernels/<family>/ops.py does, and alone calls these functions. Each releases
// Python's lock while its kernel runs.
#include <pybind11/pybind11.h>

#include "attention/attention.h"
#include "common/isa.h"
#include "common/module.h"
#include "common/parallel.h"
#include "float16/float16.h"

namespace py = pybind11;
using namespace dalle;

namespace {

// Runs the build of a kernel that fits this processor.
#define RUN_CPU_KERNEL(name, params)                          \
  do {                                                        \
    const py::gil_scoped_release unlocked;                    \
    check(#name, DALLE_CPU_KERNEL(name)(params));             \
  } while (false)

std::vector<std::string> instruction_sets(bool supported_only) {
  std::vector<std::string> names;
  for (int i = 0; i < ISA_COUNT; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (isa_built(isa) && (!supported_only || isa_supported(isa))) names.push_back(isa_name(isa));
  }
  return names;
}

void force_instruction_set(const std::string& name) {
  for (int i = 0; i < ISA_COUNT; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (isa_name(isa) == name && isa_built(isa) && isa_supported(isa)) return isa_force(isa);
  }
  throw std::invalid_argument("not an instruction set that is built and supported: " + name);
}

void bind_float16(py::module_& m) {
  using namespace py::literals;
  m.def(
      "float16_encode",
      [](uintptr_t input, int dtype, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
         uintptr_t codes, uintptr_t nonfinite, int format, int threads) {
        const Float16Encode params{pointer<const void>(input), Dtype{dtype},
                                   strided(sizes, strides),    pointer<uint16_t>(codes),
                                   pointer<uint8_t>(nonfinite), Float16Format{format}, threads};
        RUN_CPU_KERNEL(float16_encode, params);
      },
      "input"_a, "dtype"_a, "sizes"_a, "strides"_a, "codes"_a, "nonfinite"_a, "format"_a, "threads"_a);
  m.def(
      "float16_decode",
      [](uintptr_t codes, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, uintptr_t output,
         int dtype, int format, int threads) {
        const Float16Decode params{pointer<const uint16_t>(codes), strided(sizes, strides), pointer<void>(output),
                                   Dtype{dtype},                   Float16Format{format},   threads};
        RUN_CPU_KERNEL(float16_decode, params);
      },
      "codes"_a, "sizes"_a, "strides"_a, "output"_a, "dtype"_a, "format"_a, "threads"_a);
}

// A tensor [batch, heads, seq, head_dim] comes as its address and its first three strides, a pattern as its six
// numbers.
using HeadsTuple = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;
using PatternTuple = std::tuple<int, int64_t, int64_t, int64_t, int64_t, int64_t>;

Heads heads_of(const HeadsTuple& t) {
  return {pointer<void>(std::get<0>(t)), std::get<1>(t), std::get<2>(t), std::get<3>(t)};
}

Pattern pattern_of(const PatternTuple& t) {
  const auto [kind, seq, text_len, height, width, kernel_size] = t;
  return {PatternKind{kind}, seq, text_len, height, width, kernel_size};
}

void bind_attention(py::module_& m) {
  using namespace py::literals;
  m.def(
      "sparse_attention",
      [](int dtype, int64_t batch, int64_t heads, int64_t head_dim, const PatternTuple& pattern, float scale,
         const HeadsTuple& q, const HeadsTuple& k, const HeadsTuple& v, const HeadsTuple& out, uintptr_t lse,
         int threads) {
        const SparseAttention params{Dtype{dtype}, batch, heads, head_dim, pattern_of(pattern), scale, heads_of(q),
                                     heads_of(k), heads_of(v), heads_of(out), pointer<float>(lse), threads};
        RUN_CPU_KERNEL(sparse_attention, params);
      },
      "dtype"_a, "batch"_a, "heads"_a, "head_dim"_a, "pattern"_a, "scale"_a, "q"_a, "k"_a, "v"_a, "out"_a, "lse"_a,
      "threads"_a);
  m.def(
      "sparse_attention_backward",
      [](int dtype, int64_t batch, int64_t heads, int64_t head_dim, const PatternTuple& pattern, float scale,
         const HeadsTuple& grad_out, const HeadsTuple& q, const HeadsTuple& k, const HeadsTuple& v,
         const HeadsTuple& dq, const HeadsTuple& dk, const HeadsTuple& dv, int threads) {
        const SparseAttentionBackward params{Dtype{dtype}, batch, heads, head_dim, pattern_of(pattern), scale,
                                             heads_of(grad_out), heads_of(q), heads_of(k), heads_of(v),
                                             heads_of(dq), heads_of(dk), heads_of(dv), threads};
        RUN_CPU_KERNEL(sparse_attention_backward, params);
      },
      "dtype"_a, "batch"_a, "heads"_a, "head_dim"_a, "pattern"_a, "scale"_a, "grad_out"_a, "q"_a, "k"_a, "v"_a, "dq"_a,
      "dk"_a, "dv"_a, "threads"_a);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.def("instruction_sets_built", [] { return instruction_sets(false); });
  m.def("instruction_sets_available", [] { return instruction_sets(true); });
  m.def("instruction_set_used", [] { return isa_name(isa_used()); });
  m.def("force_instruction_set", &force_instruction_set, py::arg("name"));
  m.def("has_openmp", &has_openmp);
  bind_float16(m);
  bind_attention(m);
}
