// How Hopper's copy engine and tensor cores lay a tile out in shared memory: plain arithmetic, on host and device.
//
// A tile is rows of 128 bytes, 64 numbers of 16 bits, one after the other from an address that is a multiple of 1024.
// In this "swizzle" the eight 16-byte pieces of a row change places with the row's number modulo 8, so that both a row
// and a column of pieces lie in all 32 banks. Wider matrices are several tiles side by side.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace dalle {

constexpr int TILE_COLUMNS = 64;
constexpr int TILE_ROW_BYTES = 128;
constexpr int TILE_ALIGNMENT = 1024;

// Where 16-byte piece number `piece` of a row begins, in bytes from the tile's start.
DALLE_INLINE uint32_t swizzled_offset(uint32_t row, uint32_t piece) {
  return row * TILE_ROW_BYTES + ((piece ^ (row & 7)) << 4);
}

// How a product finds its right operand in a tile: start address, distance of groups of eight rows and swizzle, in
// units of 16 bytes. The distance of neighbouring tiles is unused, for no product is wider than one.
DALLE_INLINE uint64_t tile_descriptor(uint32_t address) {
  constexpr uint64_t SWIZZLE_128 = 1, GROUP = 8 * TILE_ROW_BYTES / 16, UNUSED = 1;
  return SWIZZLE_128 << 62 | GROUP << 32 | UNUSED << 16 | ((address >> 4) & 0x3fff);
}

// The descriptor of what lies `bytes` further: the numbers of rows from a multiple of 8 on, or a row's pieces from an
// even one on.
DALLE_INLINE uint64_t moved(uint64_t descriptor, uint32_t bytes) {
  const uint32_t low = static_cast<uint32_t>(descriptor) + (bytes >> 4);  // an address stays within its 14 bits
  return (descriptor & ~uint64_t{0xffffffff}) | low;
}

}  // namespace dalle
