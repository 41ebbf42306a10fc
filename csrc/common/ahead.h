// What a kernel does ahead of its data: copies into shared memory that its threads do not wait for, bytes brought into
// the L2 cache, and, on Hopper, a start before the kernels before it have ended.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/pairs.h"

namespace dalle::cuda {

inline __device__ uint8_t* launched_shared() {
  extern __shared__ __align__(16) uint8_t memory_of_launch[];
  return memory_of_launch;
}

// ---- Copies of 16 bytes into shared memory. They are seen by the thread that asked for them once it has waited for
// their group, by the others after a barrier more.
__device__ __forceinline__ void copy_pack(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from)
               : "memory");
}
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all but the last LEFT groups that this thread has committed are there.
template <int LEFT>
__device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// Brings a run of bytes, whose address and number are multiples of 16, into the L2 cache: a hint, and none before
// sm_90.
__device__ __forceinline__ void bring_to_cache(const void* from, uint32_t bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#endif
}

// ---- Kernels launched by launch_chained (common/cuda.h): what comes before await_last_kernel may read only what no
// kernel shortly before this one writes. Nothing happens in other launches, and in code for less than sm_90.
//
// Until the kernels before this one have ended and what they wrote is seen; then the next one may start. So what that
// does ahead comes after the end of all kernels before this one.
__device__ __forceinline__ void await_last_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// What a kernel before this one wrote, from the L2 cache: an earlier one may have left older bytes nearer by.
__device__ __forceinline__ FourPairs load_written(const FourPairs* from) {
  FourPairs four;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(four.pairs[0]), "=r"(four.pairs[1]), "=r"(four.pairs[2]), "=r"(four.pairs[3])
               : "l"(from)
               : "memory");
  return four;
}
template <class Element>
__device__ __forceinline__ Element load_written(const Element* from) {
  Element number;
  asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(number.bits) : "l"(from) : "memory");
  return number;
}

}  // namespace dalle::cuda
