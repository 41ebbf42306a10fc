#include "grad_scale/grad_scale.h"

#include "common/tensor_list.h"
#include "common/vector_pair.h"

namespace dalle::DALLE_ISA_NAMESPACE {
namespace {

// A thread is worth waking for about this many elements.
constexpr int64_t GRAIN = 16384;

// The bits of the smallest float that a cast makes infinite: halfway from the largest number to the next power of two.
template <class T>
constexpr uint32_t OVERFLOW_BITS = 0x7f800000u;
template <>
constexpr uint32_t OVERFLOW_BITS<Half> = 0x477ff000u;
template <>
constexpr uint32_t OVERFLOW_BITS<BFloat16> = 0x7f7f8000u;

// 0 where a cast to T would be infinite or NaN; `seen` gets bits set if it is anywhere.
template <class T>
DALLE_INLINE Vector filter(Vector x, Lanes32& seen) {
  const Lanes32 bits = bits_of(x);
  const Lanes32 kept = as<Lanes32>(as<SignedLanes32>(bits & 0x7fffffffu) < static_cast<int32_t>(OVERFLOW_BITS<T>));
  seen |= ~kept;
  return vector_of(bits & kept);
}

struct Scale {
  Vector scale;
  template <class Output>
  Vector apply(Vector x, Lanes32& seen) const {
    return filter<Output>(x * scale, seen);
  }
};

struct Unscale {
  Vector scale;
  template <class Output>
  Vector apply(Vector x, Lanes32& seen) const {
    return filter<float>(x, seen) / scale;
  }
};

// These tell whether there was an infinity or NaN.
template <class Job, class Input, class Output>
bool run(const Job& job, const void* from, void* to, int64_t begin, int64_t end) {
  const Input* input = static_cast<const Input*>(from);
  Output* output = static_cast<Output*>(to);
  Lanes32 seen{};
  int64_t i = begin;
  for (; i + Pair::width <= end; i += Pair::width) {
    const Pair x = load_pair(input + i);
    store_pair(output + i, {job.template apply<Output>(x.a, seen), job.template apply<Output>(x.b, seen)});
  }
  if (i < end) {
    Input inputs[Pair::width] = {};
    Output outputs[Pair::width];
    memcpy(inputs, input + i, (end - i) * sizeof *inputs);
    const Pair x = load_pair(inputs);
    store_pair(outputs, {job.template apply<Output>(x.a, seen), job.template apply<Output>(x.b, seen)});
    memcpy(output + i, outputs, (end - i) * sizeof *outputs);
  }
  uint32_t lanes[Vector::width], any = 0;
  memcpy(lanes, &seen, sizeof lanes);
  for (const uint32_t lane : lanes) any |= lane;
  return any != 0;
}

template <class Job>
using Run = bool (*)(const Job&, const void*, void*, int64_t begin, int64_t end);

template <class Job, class Input>
Run<Job> choose(Dtype output) {
  switch (output) {
    case Dtype::float32: return &run<Job, Input, float>;
    case Dtype::float16: return &run<Job, Input, Half>;
    case Dtype::bfloat16: return &run<Job, Input, BFloat16>;
    default: return nullptr;
  }
}

template <class Job, class Params>
const char* run_all(Run<Job> run, const Params& p) {
  if (run == nullptr) return "unknown dtype";
  const Job job{broadcast(*p.scale)};
  __atomic_store_n(p.nonfinite, uint8_t{0}, __ATOMIC_RELAXED);
  parallel_for_tensors(p.tensors, p.tensor_count, GRAIN, p.threads,
                       [&](const GradScaleTensor& tensor, int64_t begin, int64_t end) {
                         // Every thread that stores stores the same: the flag does not depend on their order.
                         if (run(job, tensor.input, tensor.output, begin, end)) {
                           __atomic_store_n(p.nonfinite, uint8_t{1}, __ATOMIC_RELAXED);
                         }
                       });
  return nullptr;
}

}  // namespace

const char* scale_cast_filter(const ScaleCastFilter& p) {
  switch (p.input_dtype) {
    case Dtype::float32: return run_all<Scale>(choose<Scale, float>(p.output_dtype), p);
    case Dtype::float16: return run_all<Scale>(choose<Scale, Half>(p.output_dtype), p);
    case Dtype::bfloat16: return run_all<Scale>(choose<Scale, BFloat16>(p.output_dtype), p);
    default: return "unknown dtype";
  }
}

const char* filter_cast_unscale(const FilterCastUnscale& p) {
  switch (p.input_dtype) {
    case Dtype::float32: return run_all<Unscale>(&run<Unscale, float, float>, p);
    case Dtype::float16: return run_all<Unscale>(&run<Unscale, Half, float>, p);
    case Dtype::bfloat16: return run_all<Unscale>(&run<Unscale, BFloat16, float>, p);
    default: return "unknown dtype";
  }
}

}  // namespace dalle::DALLE_ISA_NAMESPACE
