// Stands for csrc/common/hopper.h, whose contracts these functions keep: barriers, bulk copies and products on a CPU.
//
// What is asynchronous happens at the worst moment that is allowed. Of the copies some are made at once, into what
// somebody may still be reading, and the others late, when a fiber has nothing to do. Products read their operands and
// write their sums when they are waited for, so what was overwritten in the meantime shows. A wait that no other fiber
// can end is told instead of waited for, and so is a block that leaves a barrier in the middle of a phase: of threads
// that arrive at one that awaits fewer, some are left over.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <deque>

#include "common/hopper_layout.h"

#define DALLE_HOPPER

namespace dalle::cuda {

using plain::from_float, plain::to_float;

inline uint8_t* dynamic_shared() { return on_cpu::block->shared.data(); }
inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(pointer) - dynamic_shared());
}
template <class T>
T& shared_at(uint32_t address) {
  return *reinterpret_cast<T*>(dynamic_shared() + address);
}

template <int, bool>
void keep_registers() {}

// ---- Barriers
struct Barrier {
  uint16_t arrivals, missing;
  uint32_t phase : 1;
  int32_t bytes : 31;  // that copies are still to report
};
static_assert(sizeof(Barrier) == 8);

inline int idle = 0;  // turns of fibers in vain since anything last happened

// Memory is NaN before a barrier is made in it.
inline Barrier& barrier_at(uint32_t at) {
  Barrier& barrier = shared_at<Barrier>(at);
  if (barrier.arrivals == 0xffff) on_cpu::give_up("a barrier is used before it is made");
  return barrier;
}
inline void finish_phase(Barrier& barrier) {
  idle = 0;
  if (barrier.missing != 0 || barrier.bytes != 0) return;
  barrier.phase ^= 1;
  barrier.missing = barrier.arrivals;
}
inline void check_end();
inline void barrier_init(uint32_t barrier, uint32_t arrivals) {
  shared_at<Barrier>(barrier) = {static_cast<uint16_t>(arrivals), static_cast<uint16_t>(arrivals), 0, 0};
  on_cpu::block->barriers.push_back(barrier);
  on_cpu::block->check_end = check_end;
}
inline void barrier_arrive_expecting(uint32_t barrier, uint32_t bytes) {
  Barrier& b = barrier_at(barrier);
  if (b.missing == 0) on_cpu::give_up("more arrive at a barrier than it waits for");
  b.bytes += static_cast<int32_t>(bytes);
  --b.missing;
  finish_phase(b);
}
inline void barrier_arrive(uint32_t barrier) { barrier_arrive_expecting(barrier, 0); }

// ---- Copies
struct Copy {
  uint32_t to;
  const CUtensorMap* map;  // or nullptr
  int corner[5];
  const void* from;  // of a run of bytes
  uint32_t bytes;
  uint32_t barrier;
};
inline std::deque<Copy> late;

inline void check_end() {
  const bool leaves_copies = !late.empty();
  late.clear();
  if (on_cpu::mistake != nullptr) return;
  if (leaves_copies) on_cpu::mistake = "a block has ended before its copies have";
  for (const uint32_t at : on_cpu::block->barriers) {
    const Barrier& barrier = shared_at<Barrier>(at);
    if (barrier.missing != barrier.arrivals) on_cpu::mistake = "a block has ended in the middle of a barrier's phase";
  }
}

inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// The numbers that the copy of a box brings.
inline uint32_t copy_numbers(const Copy& copy) {
  const CUtensorMap& map = *copy.map;
  const uint32_t* box = map.box;
  const uint32_t count = box[0] * box[1] * box[2] * box[3] * box[4];
  for (uint32_t i = 0; i < count; ++i) {
    bool inside = true;
    const uint8_t* from = map.data;
    for (uint32_t axis = 0, rest = i; axis < 5; rest /= box[axis++]) {
      const int64_t place = copy.corner[axis] + static_cast<int64_t>(rest % box[axis]);
      inside = inside && place >= 0 && place < static_cast<int64_t>(map.sizes[axis]);
      from += place * static_cast<int64_t>(map.strides[axis]);
    }
    uint16_t number = 0;
    if (inside) std::memcpy(&number, from, sizeof number);
    shared_at<uint16_t>(swizzled(copy.to + 2 * i)) = number;
  }
  return count;
}

inline void make(const Copy& copy) {
  uint32_t bytes = copy.bytes;
  if (copy.map != nullptr) {
    bytes = 2 * copy_numbers(copy);
  } else {
    std::memcpy(&shared_at<uint8_t>(copy.to), copy.from, bytes);
  }
  Barrier& barrier = barrier_at(copy.barrier);
  barrier.bytes -= static_cast<int32_t>(bytes);
  if (barrier.bytes < 0) on_cpu::give_up("a copy brings bytes that its barrier does not expect");
  finish_phase(barrier);
}
inline void ask(const Copy& copy) {
  static uint32_t drawn = 1;
  drawn = drawn * 1664525 + 1013904223;
  if (drawn >> 31) {
    make(copy);
  } else {
    late.push_back(copy);
  }
}

inline void prefetch_tensor_map(const void*) {}
inline void copy_box(uint32_t to, const void* map, const int (&corner)[5], uint32_t barrier) {
  ask({to, static_cast<const CUtensorMap*>(map), {corner[0], corner[1], corner[2], corner[3], corner[4]}, nullptr, 0,
       barrier});
}
inline void copy_bytes(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  ask({to, nullptr, {}, from, bytes, barrier});
}

inline bool barrier_test(uint32_t barrier, uint32_t parity) {
  constexpr int IN_VAIN = 1 << 22;
  if (barrier_at(barrier).phase != parity) return idle = 0, true;
  if (!late.empty() && idle % 64 == 0) make(late.front()), late.pop_front();
  if (++idle > IN_VAIN) on_cpu::give_up("the kernel waits for what never comes");
  return false;
}
inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  while (!barrier_test(barrier, parity)) on_cpu::yield();
}

// ---- Products
enum class Right : int { columns = 0, rows = 1 };

struct Product {
  float* sums;
  const uint32_t* left;  // in registers, or nullptr
  uint64_t left_tile, right;
  int columns;
  bool add, rows, bfloat16;
};
struct Products {
  std::deque<Product> waiting;
  std::deque<int> groups;  // how many products each has
  int open = 0;            // of those that belong to no group yet
};
inline thread_local std::vector<Products> products;  // of every thread of the block

inline Products& own_products() { return products[on_cpu::block->running]; }

// Before a block's first use of anything here.
inline void barrier_init_done() {
  idle = 0;
  products.assign(on_cpu::block->fibers.size(), {});
}

inline void products_begin() {}
inline void products_commit() {
  Products& own = own_products();
  own.groups.push_back(own.open);
  own.open = 0;
}

inline float number_of(uint16_t bits, bool bfloat16) {
  return bfloat16 ? to_float(BFloat16{bits}) : to_float(Half{bits});
}

inline uint16_t number_at(uint64_t descriptor, int offset) {
  const uint32_t start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
  return shared_at<uint16_t>(swizzled(start + static_cast<uint32_t>(offset)));
}

// Column k of the left operand in the first or second of the thread's rows, which in registers four threads share.
inline uint16_t left_number(const Product& product, const Product* const (&row)[4], int second, int k) {
  if (product.left == nullptr) {
    const int me = on_cpu::block->running, line = me % 128 / 32 * 16 + me % 32 / 4 + 8 * second;
    return number_at(product.left_tile, line * TILE_ROW_BYTES + 2 * k);
  }
  return static_cast<uint16_t>(row[k % 8 / 2]->left[k / 8 * 2 + second] >> k % 2 * 16);
}

// One thread's part.
inline void make(const Product& product, const Product* const (&row)[4]) {
  const int lane = on_cpu::block->running % 4;
  for (int i = 0; i < product.columns / 2; ++i) {
    const int column = i / 4 * 8 + 2 * lane + i % 2, second = i / 2 % 2;
    float sum = product.add ? product.sums[i] : 0;
    for (int k = 0; k < 16; ++k) {
      const int at = product.rows ? k * TILE_ROW_BYTES + column * 2 : column * TILE_ROW_BYTES + k * 2;
      sum += number_of(left_number(product, row, second, k), product.bfloat16) *
             number_of(number_at(product.right, at), product.bfloat16);
    }
    product.sums[i] = sum;
  }
}

template <int LEFT = 0>
void products_wait() {
  Products& own = own_products();
  const int first = on_cpu::block->running / 4 * 4;
  int count = 0;
  for (size_t group = 0; group + LEFT < own.groups.size(); ++group) count += own.groups[group];
  on_cpu::meet_warp();
  for (int i = 0; i < count; ++i) {
    const Product* row[4];
    for (int lane = 0; lane < 4; ++lane) row[lane] = &products[first + lane].waiting[i];
    make(own.waiting[i], row);
  }
  on_cpu::meet_warp();
  own.waiting.erase(own.waiting.begin(), own.waiting.begin() + count);
  while (own.groups.size() > LEFT) own.groups.pop_front();
}

template <int COUNT>
void pin(float (&)[COUNT]) {}

inline void multiply_later(const Product& product) {
  Products& own = own_products();
  own.waiting.push_back(product);
  ++own.open;
}
template <Right right, int COLUMNS, class Element>
void multiply(Element, float* d, const uint32_t* a, uint64_t b, bool add) {
  multiply_later({d, a, 0, b, COLUMNS, add, right == Right::rows, std::is_same_v<Element, BFloat16>});
}
template <bool first, class Element>
void multiply_32(Element, float (&d)[16], const uint32_t* a, uint64_t b) {
  multiply_later({d, a, 0, b, 32, !first, false, std::is_same_v<Element, BFloat16>});
}
template <bool first, class Element>
void multiply_32(Element, float (&d)[16], uint64_t a, uint64_t b) {
  multiply_later({d, nullptr, a, b, 32, !first, false, std::is_same_v<Element, BFloat16>});
}

inline void load_blocks(uint32_t address, uint32_t* blocks) {
  const int lane = on_cpu::block->running % on_cpu::WARP;
  for (int block = 0; block < 4; ++block) {
    const uint32_t row = __shfl_sync(~0u, address, 8 * block + lane / 4);
    blocks[block] = shared_at<uint32_t>(row + lane % 4 * 4);
  }
}
inline void load_pair(uint32_t address, uint32_t (&words)[2]) {
  std::memcpy(words, &shared_at<uint32_t>(address), sizeof words);
}
inline float4 load_four(uint32_t address) { return shared_at<float4>(address); }
template <int ROWS>
void transpose_pieces(uint32_t (&rows)[ROWS][4]) {
  const int lane = on_cpu::block->running % on_cpu::WARP;
  for (uint32_t (&pieces)[4] : rows) {
    uint32_t given[4][4];
    for (int from = 0; from < 4; ++from) {
      for (int i = 0; i < 4; ++i) given[from][i] = on_cpu::shuffle(pieces[i], lane / 4 * 4 + from);
    }
    for (int from = 0; from < 4; ++from) pieces[from] = given[from][lane % 4];
  }
}
inline void store_16_bytes(void* to, const uint32_t (&words)[4]) { std::memcpy(to, words, sizeof words); }
inline float exp2_approximate(float x) { return std::exp2(x); }

const char* hopper_status();

}  // namespace dalle::cuda
