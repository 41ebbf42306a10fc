// Stands for CUDA's own header, so that a C++ compiler makes of kernels what runs on a CPU: for tests, and slowly.
//
// A block is a thread of the system, its threads are fibers that take turns at barriers, shuffles and naps. The blocks
// of a cooperative launch or of a cluster run at once, those of another launch one after the other. So a schedule that
// deadlocks does so here as well, and a barrier too few is found where the turns that fibers take, each to its next
// barrier, lay the mistake open. There is what the kernels under test need, and no more.
#pragma once

#include <sched.h>
#include <ucontext.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <thread>
#include <tuple>
#include <utility>
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
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719;

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
inline dim3 grid;

// The GPU that the CPU stands for, with the code for it, as tests set it.
struct Device {
  int number = 0, major = 9, minor = 0;
  int code = 90;         // the architecture that kernels were compiled for
  int shared = 227 << 10;
  int processors = 4;    // how many blocks of a cooperative launch it holds
};
inline Device device;

// A meeting point of `size` fibers, which gathers a value on the way.
struct Meeting {
  int size = 0, arrived = 0, gathered = 0, result = 0;
  unsigned generation = 0;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[STACK]};
  bool ended = false;
  uint64_t shown = 0;        // in a shuffle
  unsigned awaited = 0;      // the generation of the cluster's barrier that it arrived in
  std::vector<std::pair<float*, float>> late;  // what it has stored in other blocks and they do not see yet
};

// Blocks that run at once. The threads of each run as far as they get alone before the next one begins.
struct Cluster {
  static constexpr int MOST = 8;
  int blocks = 1, threads = 0;  // threads of all blocks
  std::atomic<int> begun{0}, arrived{0};
  std::atomic<unsigned> generation{0};
  std::atomic<char*> shared[MOST] = {};  // where each block's memory is; nullptr before it begins, after it has ended
  std::atomic<bool> strayed{false};      // somebody wrote into a block that was not there

  // The block after that of the rank may begin.
  void let_begin_after(int rank) {
    int now = begun;
    while (now <= rank && !begun.compare_exchange_weak(now, rank + 1)) {
    }
  }
};

struct Block {
  dim3 index;
  Cluster* cluster;
  int rank;
  std::vector<Fiber> fibers;
  std::vector<Meeting> warps;
  Meeting all;
  std::vector<uint8_t> shared;  // the memory asked for at the launch, filled with NaN
  std::vector<uint32_t> barriers;      // where in it there are some
  void (*check_end)() = nullptr;       // tells of what the block should not have left
  ucontext_t caller;
  int running = 0;
  const std::function<void()>* kernel = nullptr;
};

inline thread_local Block* block = nullptr;
inline thread_local char shared_memory;  // which all __shared__ variables are at the same distances from in each block

// The next fiber's turn; back in the caller when none is left.
inline void yield() {
  Block& b = *block;
  const int count = static_cast<int>(b.fibers.size()), from = b.running;
  for (int step = 1; step <= count; ++step) {
    const int next = (from + step) % count;
    if (b.fibers[next].ended) continue;
    if (next <= from) {
      b.cluster->let_begin_after(b.rank);
      sched_yield();
    }
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

// Ends the launch with an error, because of what a kernel does.
inline const char* mistake = nullptr;
inline void give_up(const char* what) {
  mistake = what;
  setcontext(&block->caller);
}

inline void run_fiber() {
  Block& b = *block;
  (*b.kernel)();
  b.fibers[b.running].ended = true;
  yield();
}

inline void run_block(const std::function<void()>& kernel, dim3 index, int threads, size_t shared, Cluster& cluster,
                      int rank) {
  Block b;
  b.index = index;
  b.cluster = &cluster;
  b.rank = rank;
  b.fibers.resize(threads);
  b.warps.resize(threads / WARP);
  for (Meeting& warp : b.warps) warp.size = WARP;
  b.all.size = threads;
  b.shared.assign(shared, 0xff);
  b.kernel = &kernel;
  block = &b;
  for (Fiber& fiber : b.fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = STACK;
    makecontext(&fiber.context, run_fiber, 0);
  }
  while (cluster.begun < rank) sched_yield();
  cluster.shared[rank] = &shared_memory;
  swapcontext(&b.caller, &b.fibers[0].context);
  if (b.check_end != nullptr) b.check_end();
  cluster.shared[rank] = nullptr;
  cluster.let_begin_after(rank);
}
inline void run_block(const std::function<void()>& kernel, dim3 index, int threads, size_t shared) {
  Cluster alone;
  alone.threads = threads;
  run_block(kernel, index, threads, shared, alone, 0);
}

// What a launch with these arguments calls in each thread.
template <class... Params, size_t... I>
std::function<void()> call_of(void (*kernel)(Params...), void** arguments, std::index_sequence<I...>) {
  const std::tuple<Params...> params{*static_cast<Params*>(arguments[I])...};
  return [=] { std::apply(kernel, params); };
}
template <class... Params>
std::function<void()> call_of(void (*kernel)(Params...), void** arguments) {
  return call_of(kernel, arguments, std::index_sequence_for<Params...>());
}

// A variable of CUDA's, whose members are read of the block that asks.
template <unsigned (*X)(), unsigned (*Y)() = X, unsigned (*Z)() = X>
struct Variable {
  template <unsigned (*READ)()>
  struct Member {
    operator unsigned() const { return READ(); }
  };
  Member<X> x;
  Member<Y> y;
  Member<Z> z;
};
inline unsigned running_thread() { return block->running; }
inline unsigned threads_of_block() { return static_cast<unsigned>(block->fibers.size()); }
template <unsigned dim3::*MEMBER>
unsigned block_index() {
  return block->index.*MEMBER;
}
template <unsigned dim3::*MEMBER>
unsigned blocks_of_grid() {
  return grid.*MEMBER;
}

}  // namespace on_cpu

static constexpr on_cpu::Variable<on_cpu::running_thread> threadIdx{};
static constexpr on_cpu::Variable<on_cpu::threads_of_block> blockDim{};
static constexpr on_cpu::Variable<on_cpu::block_index<&dim3::x>, on_cpu::block_index<&dim3::y>,
                                  on_cpu::block_index<&dim3::z>>
    blockIdx{};
static constexpr on_cpu::Variable<on_cpu::blocks_of_grid<&dim3::x>, on_cpu::blocks_of_grid<&dim3::y>,
                                  on_cpu::blocks_of_grid<&dim3::z>>
    gridDim{};

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
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline unsigned __float2uint_ru(float x) {  // saturates, as the instruction does; NaN gives 0
  const float up = std::ceil(x);
  return up > 0 ? up < 0x1p32f ? static_cast<unsigned>(up) : ~0u : 0;
}
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
inline int max(int a, int b) { return a > b ? a : b; }

// ---- The host's side
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaFuncAttributes {
  int ptxVersion;
};
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? on_cpu::mistake : "an error of the CPU that stands for a GPU";
}
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 0, cudaSuccess; }
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*)()) {
  return attributes->ptxVersion = on_cpu::device.code, cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) { return *device = on_cpu::device.number, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const on_cpu::Device& device = on_cpu::device;
  *value = attribute == cudaDevAttrMultiProcessorCount      ? device.processors
           : attribute == cudaDevAttrComputeCapabilityMajor ? device.major
           : attribute == cudaDevAttrComputeCapabilityMinor ? device.minor
                                                            : device.shared;
  return cudaSuccess;
}

namespace on_cpu {
// How much shared memory a kernel may be launched with, beyond what it declares.
template <class... Params>
int& allowed_shared(void (*kernel)(Params...)) {
  static std::map<void (*)(Params...), int> allowed;
  return allowed.emplace(kernel, 48 << 10).first->second;
}
}  // namespace on_cpu
template <class... Params>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Params...), cudaFuncAttribute, int bytes) {
  if (bytes > on_cpu::device.shared) return cudaErrorInvalidValue;
  on_cpu::allowed_shared(kernel) = bytes;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, size_t) {
  return *blocks = 1, cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* at, int value, size_t count, cudaStream_t) {
  return std::memset(at, value, count), cudaSuccess;
}

namespace on_cpu {

// One block after the other.
inline cudaError_t run_blocks(const std::function<void()>& call, dim3 blocks, unsigned threads, size_t shared) {
  const dim3 outer = grid;
  grid = blocks;
  mistake = nullptr;
  for (unsigned i = 0; i < blocks.x * blocks.y * blocks.z && mistake == nullptr; ++i) {
    const dim3 index(i % blocks.x, i / blocks.x % blocks.y, i / blocks.x / blocks.y);
    run_block(call, index, static_cast<int>(threads), shared);
  }
  grid = outer;
  return mistake == nullptr ? cudaSuccess : cudaErrorLaunchFailure;
}

// Each block a thread of the system, which runs `body` of its number.
inline void at_once(unsigned blocks, const std::function<void(unsigned)>& body) {
  std::vector<std::thread> running;
  for (unsigned i = 0; i < blocks; ++i) running.emplace_back([&, i] { body(i); });
  for (std::thread& thread : running) thread.join();
}

inline cudaError_t run_clusters(const std::function<void()>& call, unsigned blocks, unsigned threads, unsigned size) {
  if (size > Cluster::MOST || blocks % size != 0) return cudaErrorInvalidValue;
  grid = dim3(blocks);
  for (unsigned first = 0; first < blocks; first += size) {
    Cluster cluster;
    cluster.blocks = static_cast<int>(size), cluster.threads = static_cast<int>(size * threads);
    at_once(size, [&](unsigned rank) {
      run_block(call, dim3(first + rank), static_cast<int>(threads), 0, cluster, static_cast<int>(rank));
    });
    if (!cluster.strayed) continue;
    mistake = "a block wrote into one that had not begun or had ended";
    return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

// Of launches that the next one may overtake every second one, if a test asks for it, runs only once that one awaits
// it, or the test ends them: so what it reads ahead is old.
inline int held_back = -1;  // 0 or 1: which ones
inline unsigned chained = 0;
inline std::function<void()> pending;
inline void end_pending() {
  if (pending) std::thread(std::exchange(pending, {})).join();
}

}  // namespace on_cpu

template <class... Params>
cudaError_t cudaLaunchKernel(void (*kernel)(Params...), dim3 blocks, dim3 threads, void** arguments, size_t shared,
                             cudaStream_t) {
  if (shared > static_cast<size_t>(on_cpu::allowed_shared(kernel))) return cudaErrorInvalidValue;
  on_cpu::end_pending();
  return on_cpu::run_blocks(on_cpu::call_of(kernel, arguments), blocks, threads.x, shared);
}

template <class Params>
cudaError_t cudaLaunchCooperativeKernel(void (*kernel)(Params), dim3 blocks, dim3 threads, void** arguments, size_t,
                                        cudaStream_t) {
  if (static_cast<int>(blocks.x * blocks.y) > on_cpu::device.processors) return cudaErrorInvalidValue;
  on_cpu::end_pending();
  const std::function<void()> call = on_cpu::call_of(kernel, arguments);
  on_cpu::grid = blocks;
  on_cpu::at_once(blocks.x * blocks.y, [&](unsigned i) {
    on_cpu::run_block(call, dim3(i % blocks.x, i / blocks.x), threads.x, 0);
  });
  return cudaSuccess;
}

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension, cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

template <class... Params>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Params... params) {
  void* arguments[] = {&params...};
  const std::function<void()> call = on_cpu::call_of(kernel, arguments);
  const unsigned threads = config->blockDim.x;
  if (config->numAttrs != 0 && config->attrs->id == cudaLaunchAttributeClusterDimension) {
    return on_cpu::run_clusters(call, config->gridDim.x, threads, config->attrs->val.clusterDim.x);
  }
  const size_t shared = config->dynamicSmemBytes;
  if (shared > static_cast<size_t>(on_cpu::allowed_shared(kernel))) return cudaErrorInvalidValue;
  if (config->numAttrs == 0) on_cpu::end_pending();
  if (static_cast<int>(on_cpu::chained++ % 2) == on_cpu::held_back) {
    on_cpu::end_pending();
    on_cpu::pending = [=, blocks = config->gridDim] { on_cpu::run_blocks(call, blocks, threads, shared); };
    return cudaSuccess;
  }
  const cudaError_t error = on_cpu::run_blocks(call, config->gridDim, threads, shared);
  on_cpu::end_pending();
  return error;
}
