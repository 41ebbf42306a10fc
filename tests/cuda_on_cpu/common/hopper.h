// Stands for csrc/common/hopper.h: what Hopper's instructions do, done by fibers that take turns. Copies and products
// are done when they are asked for; who reads before waiting, or overwrites what others still read, is seen where turns
// lay it open.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>

#include "common/hopper_layout.h"

#define DALLE_HOPPER

namespace dalle::cuda {

using namespace plain;

constexpr uint32_t SHARED_BYTES = 227 << 10;

// What a block has: its shared memory, poisoned with NaN, and its barriers by address.
struct Barrier {
  uint32_t arrivals, pending, phase;
  int64_t bytes;
};
inline thread_local uint8_t shared_memory[SHARED_BYTES];
inline thread_local std::map<uint32_t, Barrier> barriers;

// Called by all threads, the first one's turn being the first.
inline uint32_t dynamic_shared() {
  if (on_cpu::block->running == 0) {
    memset(shared_memory, 0xff, SHARED_BYTES);
    barriers.clear();
  }
  return 0;
}

inline void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "%s\n", what);
  std::abort();
}

inline Barrier& barrier_at(uint32_t address) {
  require(barriers.count(address) == 1, "a barrier that was not made");
  return barriers[address];
}
inline void turn_if_over(Barrier& barrier) {
  require(barrier.pending <= barrier.arrivals, "more arrivals than a phase expects");
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.pending = barrier.arrivals;
}
inline void barrier_init(uint32_t address, uint32_t arrivals) { barriers[address] = {arrivals, arrivals, 0, 0}; }
inline void barrier_init_done() {}
inline void barrier_arrive(uint32_t address) {
  Barrier& barrier = barrier_at(address);
  --barrier.pending;
  turn_if_over(barrier);
}
inline void barrier_arrive_expecting(uint32_t address, uint32_t bytes) {
  barrier_at(address).bytes += bytes;
  barrier_arrive(address);
}
inline bool barrier_test(uint32_t address, uint32_t parity) { return (barrier_at(address).phase & 1) != parity; }
inline void barrier_wait(uint32_t address, uint32_t parity) {
  while (!barrier_test(address, parity)) on_cpu::yield();
}
inline void copied(uint32_t address, uint32_t bytes) {
  Barrier& barrier = barrier_at(address);
  barrier.bytes -= bytes;
  turn_if_over(barrier);
}

inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

inline void copy_box(uint32_t to, const void* pointer, const int (&corner)[5], uint32_t barrier) {
  const CUtensorMap& map = *static_cast<const CUtensorMap*>(pointer);
  require(to % TILE_ALIGNMENT == 0, "a tile that is not aligned");
  uint32_t at = to;
  for (uint32_t d = 0; d < map.box[4]; ++d) {
    for (uint32_t c = 0; c < map.box[3]; ++c) {
      for (uint32_t b = 0; b < map.box[2]; ++b) {
        for (uint32_t a = 0; a < map.box[1]; ++a, at += TILE_ROW_BYTES) {
          const uint64_t place[5] = {0, uint64_t(corner[1] + int(a)), uint64_t(corner[2] + int(b)),
                                     uint64_t(corner[3] + int(c)), uint64_t(corner[4] + int(d))};
          bool inside = true;
          uint64_t offset = 0;
          for (int i = 1; i < 5; ++i) inside &= place[i] < map.sizes[i], offset += place[i] * map.strides[i - 1];
          for (uint32_t piece = 0; piece < 8; ++piece) {
            uint8_t* row = shared_memory + swizzled(at + 16 * piece);
            if (inside) {
              memcpy(row, static_cast<const uint8_t*>(map.data) + offset + 16 * piece, 16);
            } else {
              memset(row, 0, 16);
            }
          }
        }
      }
    }
  }
  copied(barrier, at - to);
}
inline void copy_bytes(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  require(to % 16 == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0 && bytes % 16 == 0, "not in 16 bytes");
  memcpy(shared_memory + to, from, bytes);
  copied(barrier, bytes);
}

// ---- Products
inline void products_begin() {}
inline void products_commit() {}
inline void products_wait() {}
template <int COUNT>
void products_wait_but() {}
template <int COUNT>
void pin(float (&)[COUNT]) {}

enum class Right : int { columns = 0, rows = 1 };

template <class Element>
float number_at(uint32_t address) {
  Element number;
  memcpy(&number, shared_memory + swizzled(address), sizeof number);
  return to_float(number);
}
inline uint32_t address_of(uint64_t descriptor) { return (descriptor & 0x3fff) << 4; }

inline thread_local uint32_t lefts[1024][4];

// The thread's two rows of a left operand's 16 columns.
template <class Element>
void gather(const uint32_t* a, float (&rows)[2][16]) {
  const int me = on_cpu::block->running, quad = me / 4 * 4;
  memcpy(lefts[me], a, 16);
  __syncwarp();
  for (int i = 0; i < 32; ++i) {
    const int row = i / 16, column = i % 16;
    const uint32_t pair = lefts[quad + column % 8 / 2][row + column / 8 * 2];
    const Element number{static_cast<uint16_t>(column % 2 ? pair >> 16 : pair)};
    rows[row][column] = to_float(number);
  }
  __syncwarp();
}
template <class Element>
void gather(uint64_t a, float (&rows)[2][16]) {
  __syncwarp();
  const int me = on_cpu::block->running, row = me % 128 / 32 * 16 + me % 32 / 4;
  for (int i = 0; i < 32; ++i) {
    rows[i / 16][i % 16] = number_at<Element>(address_of(a) + (row + i / 16 * 8) * TILE_ROW_BYTES + i % 16 * 2);
  }
}

template <class Element, Right right>
void add_products(float* d, int columns, const float (&rows)[2][16], uint64_t b, bool add) {
  for (int i = 0; i < columns / 2; ++i) {
    const int column = i / 4 * 8 + on_cpu::block->running % 4 * 2 + i % 2;
    float sum = add ? d[i] : 0;
    for (int k = 0; k < 16; ++k) {
      const uint32_t offset = right == Right::rows ? k * TILE_ROW_BYTES + column * 2 : column * TILE_ROW_BYTES + k * 2;
      sum += rows[i / 2 % 2][k] * number_at<Element>(address_of(b) + offset);
    }
    d[i] = sum;
  }
}
template <Right right, int COLUMNS, class Element>
void multiply(Element, float* d, const uint32_t* a, uint64_t b, bool add) {
  float rows[2][16];
  gather<Element>(a, rows);
  add_products<Element, right>(d, COLUMNS, rows, b, add);
}
template <bool first, class Element, class Left>
void multiply_32(Element, float (&d)[16], Left a, uint64_t b) {
  float rows[2][16];
  gather<Element>(a, rows);
  add_products<Element, Right::columns>(d, 32, rows, b, !first);
}

template <class Element>
uint32_t packed(Element, float low, float high) {
  Element numbers[2];
  from_float(low, numbers[0]);
  from_float(high, numbers[1]);
  return numbers[0].bits | static_cast<uint32_t>(numbers[1].bits) << 16;
}
template <class Element>
float2 unpacked(Element, uint32_t pair) {
  return {to_float(Element{static_cast<uint16_t>(pair)}), to_float(Element{static_cast<uint16_t>(pair >> 16)})};
}

inline void load_blocks(uint32_t address, uint32_t* blocks) {
  for (int i = 0; i < 4; ++i) {
    const uint32_t row = on_cpu::shuffle(address, 8 * i + on_cpu::block->running % 32 / 4);
    memcpy(blocks + i, shared_memory + row + on_cpu::block->running % 4 * 4, 4);
  }
}
inline float4 load_four(uint32_t address) {
  float4 four;
  memcpy(&four, shared_memory + address, sizeof four);
  return four;
}
inline void store_16_bytes(void* to, const uint32_t (&words)[4]) { memcpy(to, words, 16); }

inline void transpose_pieces(uint32_t (&pieces)[4]) {
  const int me = on_cpu::block->running;
  memcpy(lefts[me], pieces, 16);
  __syncwarp();
  for (int i = 0; i < 4; ++i) pieces[i] = lefts[me / 4 * 4 + i][me % 4];
  __syncwarp();
}

inline float exp2_approximate(float x) { return std::exp2(x); }

inline const char* hopper_status() { return nullptr; }

}  // namespace dalle::cuda
