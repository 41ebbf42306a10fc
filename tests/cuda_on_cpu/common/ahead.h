// Stands for csrc/common/ahead.h: copies are made at the last moment that is allowed, when a thread waits for them.
#pragma once

#include <cuda_runtime.h>

#include <deque>
#include <utility>
#include <vector>

namespace dalle::cuda {

inline uint8_t* launched_shared() { return on_cpu::block->shared.data(); }

struct Asked {
  std::vector<std::pair<void*, const void*>> now;
  std::deque<std::vector<std::pair<void*, const void*>>> groups;
};
inline Asked& asked() {
  static thread_local Asked of_threads[1024];  // of a block, which is a thread of the system
  return of_threads[on_cpu::block->running];
}
inline void copy_pack(void* to, const void* from) { asked().now.emplace_back(to, from); }
inline void copies_commit() { asked().groups.push_back(std::exchange(asked().now, {})); }
template <int LEFT>
void copies_wait() {
  for (auto& groups = asked().groups; groups.size() > LEFT; groups.pop_front()) {
    for (const auto& [to, from] : groups.front()) std::memcpy(to, from, 16);
  }
}

inline void bring_to_cache(const void*, uint32_t) {}
inline void await_last_kernel() {
  if (on_cpu::device.code >= 90) on_cpu::end_pending();
}
template <class T>
T load_written(const T* from) {
  return *from;
}

}  // namespace dalle::cuda
