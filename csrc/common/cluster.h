// Clusters: blocks that run together and write into each other's shared memory. CUDA only; in code for
// less than sm_90 a cluster is one block.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/cuda.h"

namespace dalle::cuda {

constexpr unsigned MOST_CLUSTER = 8;  // blocks, on every GPU that has clusters

// How many blocks a cluster may have on the current device.
inline unsigned most_cluster() { return code_architecture() >= 90 ? MOST_CLUSTER : 1; }

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

__device__ __forceinline__ int cluster_blocks() {
  int blocks;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  return blocks;
}
__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of the cluster arrive before any of them is done waiting, and see what was written before.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Stores to where `shared` lies in the block of that rank.
__device__ __forceinline__ void store_to_block(float* shared, int rank, float value) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(address)
      : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))), "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

#else

__device__ __forceinline__ int cluster_blocks() { return 1; }
__device__ __forceinline__ int cluster_rank() { return 0; }
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_wait() { __syncthreads(); }
__device__ __forceinline__ void store_to_block(float* shared, int, float value) { *shared = value; }

#endif

}  // namespace dalle::cuda
