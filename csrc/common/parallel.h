// Loops over threads, on the OpenMP runtime that torch has already loaded (parallel.cpp says how and why).
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace dalle {

// Calls body(context, thread, team) on each thread of a team of at most `threads`, the caller being one of them, and
// returns when all are done. The team may be smaller than asked for; a body must divide its work by `team`.
void run_team(int threads, void (*body)(void* context, int thread, int team), void* context);

// "GOMP_parallel" in torch's runtime was found; without it every loop runs on the calling thread.
bool has_openmp();

}  // namespace dalle

#if defined(DALLE_ISA_NAMESPACE)
namespace dalle::DALLE_ISA_NAMESPACE {

// Calls body(begin, end) over disjoint pieces of [0, count), one contiguous piece a thread, no more of them than it
// takes pieces of `grain` items. For work that is even and should touch memory in order.
template <class Body>
inline void parallel_for(int64_t count, int64_t grain, int threads, const Body& body) {
  if (count <= 0) return;
  const int64_t pieces = (count + grain - 1) / grain;
  const int wanted = static_cast<int64_t>(threads) < pieces ? threads : static_cast<int>(pieces);
  if (wanted <= 1) return body(int64_t{0}, count);
  struct Context {
    int64_t count;
    const Body& body;
  } context{count, body};
  run_team(
      wanted,
      [](void* address, int thread, int team) {
        const Context& c = *static_cast<const Context*>(address);
        const int64_t share = c.count / team, rest = c.count % team;
        const int64_t begin = thread * share + (thread < rest ? thread : rest);
        const int64_t end = begin + share + (thread < rest ? 1 : 0);
        if (begin < end) c.body(begin, end);
      },
      &context);
}

// Calls body(next, thread) once on each thread. next() gives every item of [0, count) once, in order, to whoever asks
// first, and -1 when none is left; 0 <= thread < threads tells scratch memory apart. For items of uneven cost: start
// the dearest first.
template <class Body>
inline void parallel_pull(int64_t count, int threads, const Body& body) {
  if (count <= 0) return;
  const int wanted = static_cast<int64_t>(threads) < count ? threads : static_cast<int>(count);
  struct Context {
    int64_t count, next;
    const Body& body;
  } context{count, 0, body};
  run_team(
      wanted,
      [](void* address, int thread, int) {
        Context& c = *static_cast<Context*>(address);
        const auto next = [&c] {
          const int64_t item = __atomic_fetch_add(&c.next, 1, __ATOMIC_RELAXED);
          return item < c.count ? item : -1;
        };
        c.body(next, thread);
      },
      &context);
}

// Calls body(item, thread) for every item, as parallel_pull hands them out.
template <class Body>
inline void parallel_items(int64_t count, int threads, const Body& body) {
  parallel_pull(count, threads, [&](const auto& next, int thread) {
    for (int64_t item = next(); item >= 0; item = next()) body(item, thread);
  });
}

}  // namespace dalle::DALLE_ISA_NAMESPACE
#endif
