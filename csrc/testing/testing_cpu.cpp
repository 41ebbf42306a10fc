#include "testing/testing.h"

#include "common/vector_math.h"

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

}  // namespace dalle::DALLE_ISA_NAMESPACE
