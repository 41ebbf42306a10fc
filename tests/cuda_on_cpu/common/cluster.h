// Stands for csrc/common/cluster.h. Of the stores to other blocks every second one happens at once, into what somebody
// may still be reading, and the others when the thread next arrives at the cluster's barrier, as late as may be.
#pragma once

#include <cuda_runtime.h>

#include "common/cuda.h"

namespace dalle::cuda {

constexpr unsigned MOST_CLUSTER = on_cpu::Cluster::MOST;
inline unsigned most_cluster() { return code_architecture() >= 90 ? MOST_CLUSTER : 1; }
inline int cluster_blocks() { return on_cpu::device.code >= 90 ? on_cpu::block->cluster->blocks : 1; }
inline int cluster_rank() { return on_cpu::device.code >= 90 ? on_cpu::block->rank : 0; }

inline void cluster_arrive() {
  on_cpu::Cluster& cluster = *on_cpu::block->cluster;
  on_cpu::Fiber& fiber = on_cpu::block->fibers[on_cpu::block->running];
  for (const auto& [place, value] : fiber.late) *place = value;
  fiber.late.clear();
  fiber.awaited = cluster.generation;
  if (++cluster.arrived == cluster.threads) {
    cluster.arrived = 0;
    ++cluster.generation;
  }
}
inline void cluster_wait() {
  const on_cpu::Fiber& fiber = on_cpu::block->fibers[on_cpu::block->running];
  while (on_cpu::block->cluster->generation == fiber.awaited) on_cpu::yield();
}

inline void store_to_block(float* shared, int rank, float value) {
  on_cpu::Cluster& cluster = *on_cpu::block->cluster;
  char* const there = cluster.shared[rank];
  if (there == nullptr) {
    cluster.strayed = true;
    return;
  }
  float* const place = reinterpret_cast<float*>(there + (reinterpret_cast<char*>(shared) - &on_cpu::shared_memory));
  static thread_local bool late = false;
  late = !late;
  if (late) {
    on_cpu::block->fibers[on_cpu::block->running].late.emplace_back(place, value);
  } else {
    *place = value;
  }
}

}  // namespace dalle::cuda
