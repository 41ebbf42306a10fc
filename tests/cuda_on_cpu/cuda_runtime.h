// Stands for CUDA's own header, so that a C++ compiler makes of kernels what runs on a CPU: for tests, and slowly.
//
// A block is a thread of the system, its threads are fibers that take turns at barriers, shuffles and naps. The blocks
// of a cooperative launch run at once, those of another one after the other. So a schedule that deadlocks does so here
// as well, and a barrier too few is found where the turns that fibers take, each to its next barrier, lay the mistake
// open. There is what the kernels under test need, and no more.
#pragma once

#include <sched.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static thread_local  // of a block, which is a thread of the system

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchTimeout = 702;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};

namespace on_cpu {

constexpr int WARP = 32, STACK = 1 << 16;
inline int processors = 4;  // how many blocks of a cooperative launch the device holds
inline dim3 grid;

// A meeting point of `size` fibers, which gathers a value on the way.
struct Meeting {
  int size = 0, arrived = 0, gathered = 0, result = 0;
  unsigned generation = 0;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[STACK]};
  bool ended = false;
  uint64_t shown = 0;  // in a shuffle
};

struct Block {
  dim3 index;
  std::vector<Fiber> fibers;
  std::vector<Meeting> warps;
  Meeting all;
  std::vector<uint8_t> shared;  // the memory asked for at the launch, filled with NaN
  ucontext_t caller;
  int running = 0, left = 0;
  void (*kernel)(void*) = nullptr;
  void* argument = nullptr;
};

inline thread_local Block* block = nullptr;

// The next fiber's turn; back in the caller when none is left.
inline void yield() {
  Block& b = *block;
  const int count = static_cast<int>(b.fibers.size()), from = b.running;
  for (int step = 1; step <= count; ++step) {
    const int next = (from + step) % count;
    if (b.fibers[next].ended) continue;
    if (next <= from) sched_yield();
    b.running = next;
    if (next != from) swapcontext(&b.fibers[from].context, &b.fibers[next].context);
    return;
  }
  setcontext(&b.caller);
}

// Waits for the others; the bits of all values.
inline int meet(Meeting& meeting, int value) {
  const unsigned generation = meeting.generation;
  meeting.gathered |= value;
  if (++meeting.arrived == meeting.size) {
    meeting.arrived = 0;
    meeting.result = meeting.gathered;
    meeting.gathered = 0;
    ++meeting.generation;
  }
  while (meeting.generation == generation) yield();
  return meeting.result;
}

inline void meet_warp() { meet(block->warps[block->running / WARP], 0); }

template <class T>
T shuffle(T value, int lane) {
  const int me = block->running;
  std::memcpy(&block->fibers[me].shown, &value, sizeof(T));
  meet_warp();
  T found;
  std::memcpy(&found, &block->fibers[me / WARP * WARP + lane % WARP].shown, sizeof(T));
  meet_warp();
  return found;
}

// Ends the launch with an error: threads wait for what never comes.
inline bool deadlocked = false;
inline void give_up() {
  deadlocked = true;
  setcontext(&block->caller);
}

inline void run_fiber() {
  Block& b = *block;
  b.kernel(b.argument);
  b.fibers[b.running].ended = true;
  yield();
}

template <class Params>
void run_block(void (*kernel)(Params), const Params& params, dim3 index, int threads, size_t shared = 0) {
  struct Call {
    void (*kernel)(Params);
    const Params* params;
  } call{kernel, &params};
  Block b;
  b.index = index;
  b.fibers.resize(threads);
  b.warps.resize(threads / WARP);
  for (Meeting& warp : b.warps) warp.size = WARP;
  b.all.size = threads;
  b.shared.assign(shared, 0xff);
  b.argument = &call;
  b.kernel = [](void* argument) {
    const Call& made = *static_cast<const Call*>(argument);
    made.kernel(*made.params);
  };
  block = &b;
  for (Fiber& fiber : b.fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = STACK;
    makecontext(&fiber.context, run_fiber, 0);
  }
  swapcontext(&b.caller, &b.fibers[0].context);
}

struct ThreadIndex {
  struct {
    operator unsigned() const { return block->running; }
  } x;
};

struct BlockSize {
  struct {
    operator unsigned() const { return static_cast<unsigned>(block->fibers.size()); }
  } x;
};

}  // namespace on_cpu

static constexpr on_cpu::ThreadIndex threadIdx{};
static constexpr on_cpu::BlockSize blockDim{};
#define blockIdx on_cpu::block->index
#define gridDim on_cpu::grid

// ---- Within a kernel
inline void __syncthreads() { on_cpu::meet(on_cpu::block->all, 0); }
inline int __syncthreads_and(int value) { return !on_cpu::meet(on_cpu::block->all, value == 0); }
inline void __syncwarp() { on_cpu::meet_warp(); }
inline void __nanosleep(unsigned) { on_cpu::yield(); }
inline void __threadfence() { __sync_synchronize(); }
inline unsigned atomicAdd(unsigned* at, unsigned value) { return __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST); }
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return on_cpu::shuffle(value, lane);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int bits) {
  return on_cpu::shuffle(value, on_cpu::block->running % on_cpu::WARP ^ bits);
}
inline unsigned __reduce_or_sync(unsigned, unsigned value) {
  return static_cast<unsigned>(on_cpu::meet(on_cpu::block->warps[on_cpu::block->running / on_cpu::WARP],
                                            static_cast<int>(value)));
}
inline int __any_sync(unsigned, int value) { return __reduce_or_sync(~0u, value != 0) != 0; }
inline int __all_sync(unsigned, int value) { return !__reduce_or_sync(~0u, value == 0); }
template <class T>
T __ldg(const T* at) {
  return *at;
}
inline float __fdividef(float a, float b) { return a / b; }
inline float __log2f(float x) { return std::log2(x); }
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
inline int min(int a, int b) { return a < b ? a : b; }

// ---- The host's side
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaFuncAttributes {};
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchTimeout ? "the kernel waits for what never comes"
                                         : "an error of the CPU that stands for a GPU";
}
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 0, cudaSuccess; }
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, void (*)()) { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = on_cpu::processors, cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, size_t) {
  return *blocks = 1, cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* at, int value, size_t count, cudaStream_t) {
  return std::memset(at, value, count), cudaSuccess;
}

template <class Params>
cudaError_t cudaLaunchKernel(void (*kernel)(Params), dim3 blocks, dim3 threads, void** arguments, size_t shared,
                             cudaStream_t) {
  on_cpu::grid = blocks;
  on_cpu::deadlocked = false;
  for (unsigned z = 0; z < blocks.z; ++z) {
    for (unsigned y = 0; y < blocks.y; ++y) {
      for (unsigned x = 0; x < blocks.x; ++x) {
        on_cpu::run_block(kernel, *static_cast<Params*>(arguments[0]), dim3(x, y, z), threads.x, shared);
        if (on_cpu::deadlocked) return cudaErrorLaunchTimeout;
      }
    }
  }
  return cudaSuccess;
}

template <class Params>
cudaError_t cudaLaunchCooperativeKernel(void (*kernel)(Params), dim3 blocks, dim3 threads, void** arguments, size_t,
                                        cudaStream_t) {
  if (static_cast<int>(blocks.x * blocks.y) > on_cpu::processors) return cudaErrorInvalidValue;
  on_cpu::grid = blocks;
  std::vector<std::thread> running;
  for (unsigned i = 0; i < blocks.x * blocks.y; ++i) {
    const dim3 index(i % blocks.x, i / blocks.x);
    running.emplace_back(
        [=] { on_cpu::run_block(kernel, *static_cast<Params*>(arguments[0]), index, threads.x); });
  }
  for (std::thread& thread : running) thread.join();
  return cudaSuccess;
}
