// What Hopper's own instructions (compute capability 9.0, architecture sm_90a) need, each in a few lines.
//
// A kernel whose body is under `#if defined(DALLE_HOPPER)` compiles for every architecture and is empty on the others;
// its host code asks hopper_status() first, which knows whether CMakeLists.txt was told to compile for sm_90a.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/hopper_layout.h"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define DALLE_HOPPER
#endif

namespace dalle::cuda {

// The shared memory that a launch asks for, aligned for tiles.
inline __device__ uint8_t* dynamic_shared() {
  extern __shared__ __align__(TILE_ALIGNMENT) uint8_t memory[];
  return memory;
}

inline __device__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The registers that each thread of a warpgroup has from here on: more of them waits for others to give theirs up.
template <int COUNT, bool MORE>
inline __device__ void keep_registers() {
  if constexpr (MORE) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
  }
}

// ---- mbarrier: 64 bits in shared memory. A phase ends once the expected arrivals have come and, where copies report
// to it, their bytes as well. Waiting for parity p returns when the phase of that parity is over: 0 is the first
// phase's, and waiting for 1 on a fresh barrier returns at once.

inline __device__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// After the inits and before anybody else's use, copies included; a block-wide barrier follows.
inline __device__ void barrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

inline __device__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

inline __device__ void barrier_arrive_expecting(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Whether the phase is over, at once.
inline __device__ bool barrier_test(uint32_t barrier, uint32_t parity) {
  uint32_t over;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(over)
      : "r"(barrier), "r"(parity)
      : "memory");
  return over != 0;
}

inline __device__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t over;
  do {
    // Sleeps for a while at most, until the phase is over.
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(over)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (over == 0);
}

// ---- Bulk tensor copies: one thread asks for a box of a tensor, the copy engine writes it into shared memory, zeros
// where the box leaves the tensor, and reports the whole box's bytes to the barrier.

inline __device__ void prefetch_tensor_map(const void* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

inline __device__ void copy_box(uint32_t to, const void* map, const int (&corner)[5], uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5, "
      "%6}], [%7];" ::"r"(to),
      "l"(map), "r"(corner[0]), "r"(corner[1]), "r"(corner[2]), "r"(corner[3]), "r"(corner[4]), "r"(barrier)
      : "memory");
}

// A run of bytes, whose count and addresses are multiples of 16, as they are.
inline __device__ void copy_bytes(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
      "r"(bytes), "r"(barrier)
      : "memory");
}

// ---- wgmma: four consecutive warps multiply 64 rows, 16 of each warp, with a matrix in shared memory, asynchronously.
// Thread t of a warp has, of every 8 columns, columns 2 * (t % 4) and the next one of rows t / 4 (elements 0 and 1 of
// four) and t / 4 + 8 (elements 2 and 3): of sums as floats, of the left operand as pairs of 16 bits.

// Before the first product after registers that products read or add to were written.
inline __device__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
inline __device__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until all but the last LEFT groups of products that were committed are done.
template <int LEFT = 0>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// Keeps the compiler from moving uses of sums to before the wait for them.
template <int COUNT>
__device__ __forceinline__ void pin(float (&sums)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// What the rows in shared memory are of the right operand.
enum class Right : int { columns = 0, rows = 1 };

#define DALLE_SUMS_8(d, i)                                                                                          \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]),       \
      "+f"(d[i + 7])
#define DALLE_SUMS_16(d, i) DALLE_SUMS_8(d, i), DALLE_SUMS_8(d, i + 8)
#define DALLE_SUMS_32(d) DALLE_SUMS_16(d, 0), DALLE_SUMS_16(d, 16)
#define DALLE_SUMS_40(d) DALLE_SUMS_32(d), DALLE_SUMS_8(d, 32)
#define DALLE_SUMS_48(d) DALLE_SUMS_32(d), DALLE_SUMS_16(d, 32)

#define DALLE_WGMMA(COLUMNS, TYPE, REGISTERS, A0, A1, A2, A3, B, ADD, RIGHT, SUMS)                                  \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ADD ", 0;\nwgmma.mma_async.sync.aligned.m64n" COLUMNS             \
               "k16.f32." TYPE "." TYPE " {" REGISTERS "}, {" A0 ", " A1 ", " A2 ", " A3 "}, " B ", p, 1, 1, " RIGHT \
               ";\n}"                                                                                               \
               : SUMS                                                                                               \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)),                    \
                 "n"(static_cast<int>(right)))

#define DALLE_REGISTERS_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define DALLE_REGISTERS_16 DALLE_REGISTERS_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define DALLE_REGISTERS_32 \
  DALLE_REGISTERS_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define DALLE_REGISTERS_40 DALLE_REGISTERS_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define DALLE_REGISTERS_48 DALLE_REGISTERS_40 ", %40, %41, %42, %43, %44, %45, %46, %47"

// d (+)= a * b: 64 x 16 numbers by 16 x COLUMNS, of which b is the descriptor (hopper_layout.h). `d` may point into an
// array, with a constant.
#define DALLE_DEFINE_PRODUCTS(Element, TYPE)                                                                        \
  template <Right right, int COLUMNS>                                                                               \
  __device__ __forceinline__ void multiply(Element, float* d, const uint32_t* a, uint64_t b, bool add) {            \
    static_assert(COLUMNS == 16 || COLUMNS == 32 || COLUMNS == 64 || COLUMNS == 80 || COLUMNS == 96);               \
    if constexpr (COLUMNS == 96) {                                                                                  \
      DALLE_WGMMA("96", TYPE, DALLE_REGISTERS_48, "%48", "%49", "%50", "%51", "%52", "%53", "%54",                  \
                  DALLE_SUMS_48(d));                                                                                \
    } else if constexpr (COLUMNS == 80) {                                                                           \
      DALLE_WGMMA("80", TYPE, DALLE_REGISTERS_40, "%40", "%41", "%42", "%43", "%44", "%45", "%46",                  \
                  DALLE_SUMS_40(d));                                                                                \
    } else if constexpr (COLUMNS == 64) {                                                                           \
      DALLE_WGMMA("64", TYPE, DALLE_REGISTERS_32, "%32", "%33", "%34", "%35", "%36", "%37", "%38",                  \
                  DALLE_SUMS_32(d));                                                                                \
    } else if constexpr (COLUMNS == 32) {                                                                           \
      DALLE_WGMMA("32", TYPE, DALLE_REGISTERS_16, "%16", "%17", "%18", "%19", "%20", "%21", "%22",                  \
                  DALLE_SUMS_16(d, 0));                                                                             \
    } else {                                                                                                        \
      DALLE_WGMMA("16", TYPE, DALLE_REGISTERS_8, "%8", "%9", "%10", "%11", "%12", "%13", "%14", DALLE_SUMS_8(d, 0)); \
    }                                                                                                               \
  }

DALLE_DEFINE_PRODUCTS(BFloat16, "bf16")
DALLE_DEFINE_PRODUCTS(Half, "f16")

#undef DALLE_DEFINE_PRODUCTS

// 64 x 16 numbers by 16 x 32, of a right operand whose columns are the rows in shared memory, and a left one that is in
// registers or, `a` being its descriptor, in shared memory too. `first` products take no sums: what was in `d` is no
// longer needed, which the compiler knows, and no register of it waits for products under way.
#define DALLE_RESULTS_8(d, i)                                                                                       \
  "=f"(d[i]), "=f"(d[i + 1]), "=f"(d[i + 2]), "=f"(d[i + 3]), "=f"(d[i + 4]), "=f"(d[i + 5]), "=f"(d[i + 6]),       \
      "=f"(d[i + 7])
#define DALLE_RESULTS_16(d) DALLE_RESULTS_8(d, 0), DALLE_RESULTS_8(d, 8)
#define DALLE_WGMMA_32(TYPE, A, B, ADD, IMMEDIATES, SUMS, ...)                                                      \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ADD ", 0;\nwgmma.mma_async.sync.aligned.m64n32k16.f32." TYPE     \
               "." TYPE " {" DALLE_REGISTERS_16 "}, " A ", " B ", p, 1, 1, " IMMEDIATES ";\n}"                      \
               : SUMS                                                                                               \
               : __VA_ARGS__)
#define DALLE_LEFT "{%16, %17, %18, %19}"

#define DALLE_DEFINE_PRODUCTS_32(Element, TYPE)                                                                     \
  template <bool first>                                                                                             \
  __device__ __forceinline__ void multiply_32(Element, float (&d)[16], const uint32_t* a, uint64_t b) {             \
    if constexpr (first) {                                                                                          \
      DALLE_WGMMA_32(TYPE, DALLE_LEFT, "%20", "0", "0", DALLE_RESULTS_16(d), "r"(a[0]), "r"(a[1]), "r"(a[2]),       \
                     "r"(a[3]), "l"(b));                                                                            \
    } else {                                                                                                        \
      DALLE_WGMMA_32(TYPE, DALLE_LEFT, "%20", "1", "0", DALLE_SUMS_16(d, 0), "r"(a[0]), "r"(a[1]), "r"(a[2]),       \
                     "r"(a[3]), "l"(b));                                                                            \
    }                                                                                                               \
  }                                                                                                                 \
  template <bool first>                                                                                             \
  __device__ __forceinline__ void multiply_32(Element, float (&d)[16], uint64_t a, uint64_t b) {                    \
    if constexpr (first) {                                                                                          \
      DALLE_WGMMA_32(TYPE, "%16", "%17", "0", "0, 0", DALLE_RESULTS_16(d), "l"(a), "l"(b));                         \
    } else {                                                                                                        \
      DALLE_WGMMA_32(TYPE, "%16", "%17", "1", "0, 0", DALLE_SUMS_16(d, 0), "l"(a), "l"(b));                         \
    }                                                                                                               \
  }

DALLE_DEFINE_PRODUCTS_32(BFloat16, "bf16")
DALLE_DEFINE_PRODUCTS_32(Half, "f16")

#undef DALLE_DEFINE_PRODUCTS_32
#undef DALLE_LEFT
#undef DALLE_WGMMA_32
#undef DALLE_RESULTS_16
#undef DALLE_RESULTS_8
#undef DALLE_REGISTERS_48
#undef DALLE_REGISTERS_40
#undef DALLE_REGISTERS_32
#undef DALLE_REGISTERS_16
#undef DALLE_REGISTERS_8
#undef DALLE_WGMMA
#undef DALLE_SUMS_48
#undef DALLE_SUMS_40
#undef DALLE_SUMS_32
#undef DALLE_SUMS_16
#undef DALLE_SUMS_8

// Four 8 x 8 blocks of 16-bit numbers, as a left operand's 16 x 16 has them: thread t gives the address of row t % 8 of
// block t / 8.
inline __device__ void load_blocks(uint32_t address, uint32_t* blocks) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(blocks[0]), "=r"(blocks[1]), "=r"(blocks[2]), "=r"(blocks[3])
               : "r"(address)
               : "memory");
}

inline __device__ float4 load_four(uint32_t address) {
  float4 four;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(four.x), "=f"(four.y), "=f"(four.z), "=f"(four.w)
               : "r"(address)
               : "memory");
  return four;
}

// Two words of shared memory.
inline __device__ void load_pair(uint32_t address, uint32_t (&words)[2]) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "r"(address) : "memory");
}

inline __device__ void store_16_bytes(void* to, const uint32_t (&words)[4]) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(words[0]), "r"(words[1]), "r"(words[2]),
               "r"(words[3])
               : "memory");
}

// Four threads have 16 bytes each of four pieces of a row, one piece after the other; afterwards each has one piece. So
// for each of several rows.
template <int ROWS>
__device__ __forceinline__ void transpose_pieces(uint32_t (&rows)[ROWS][4]) {
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
#pragma unroll
  for (int row = 0; row < ROWS; ++row) {
    uint32_t (&pieces)[4] = rows[row];
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const uint32_t got = __shfl_xor_sync(~0u, odd ? pieces[i] : pieces[i + 1], 1);
      pieces[i] = odd ? got : pieces[i], pieces[i + 1] = odd ? pieces[i + 1] : got;
    }
  }
#pragma unroll
  for (int row = 0; row < ROWS; ++row) {
    uint32_t (&pieces)[4] = rows[row];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t got = __shfl_xor_sync(~0u, high ? pieces[i] : pieces[i + 2], 2);
      pieces[i] = high ? got : pieces[i], pieces[i + 2] = high ? pieces[i + 2] : got;
    }
  }
}

inline __device__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Why the current device does not run kernels made of these, or nullptr.
const char* hopper_status();

}  // namespace dalle::cuda
