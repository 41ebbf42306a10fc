// Headers shared by the CPU builds and CUDA: what marks a function, and the namespace it lives in.
#pragma once

#if !defined(DALLE_ISA_NAMESPACE)
// Sources that are compiled once only: nvcc's and the Python modules.
#define DALLE_ISA_NAMESPACE plain
#endif

#if defined(__CUDACC__)
#define DALLE_INLINE static __host__ __device__ __forceinline__
#else
#define DALLE_INLINE [[maybe_unused]] static inline __attribute__((always_inline))
#endif

// A call costs nothing beside the loops in a function so marked, and a copy at every place of use costs minutes of
// compiling.
#define DALLE_NOINLINE __attribute__((noinline))
