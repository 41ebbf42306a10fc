// Threads over many tensors at once, large and small ones, as if their elements lay end to end.
#pragma once

#include "common/parallel.h"

namespace dalle::DALLE_ISA_NAMESPACE {

// Threads share a tensor at multiples of this many elements: whole cache lines of any dtype, whole pairs of vectors.
constexpr int64_t SPLIT = 64;

// Where in a tensor of `count` elements a share begins or ends that does so `position` elements after its first.
static inline int64_t share_boundary(int64_t position, int64_t count) {
  if (position <= 0) return 0;
  return position >= count ? count : position / SPLIT * SPLIT;
}

// Calls body(tensor, begin, end) over disjoint pieces of tensors that have a `count` each; every thread gets an even
// share of all elements, and no more threads than there are shares of `grain` elements are woken.
template <class Tensor, class Body>
inline void parallel_for_tensors(const Tensor* tensors, int64_t tensor_count, int64_t grain, int threads,
                                 const Body& body) {
  int64_t total = 0;
  for (int64_t t = 0; t < tensor_count; ++t) total += tensors[t].count;
  parallel_for(total, grain, threads, [&](int64_t begin, int64_t end) {
    int64_t start = 0;
    for (int64_t t = 0; t < tensor_count && start < end; start += tensors[t++].count) {
      const int64_t from = share_boundary(begin - start, tensors[t].count);
      const int64_t to = share_boundary(end - start, tensors[t].count);
      if (from < to) body(tensors[t], from, to);
    }
  });
}

}  // namespace dalle::DALLE_ISA_NAMESPACE
