// Where a decode step's image keys lie in a cache, as arithmetic: what dalle_kernels/attention/slots.py lists, for a
// token that only the device knows. Plain functions, on host and device.
//
// Keys are numbered by how far back they lie. Number n has gone (n + middle) / span times around the edge of the
// window, over the `skip` tokens that lie beyond it, so it is n + rows * skip slots back in the ring; where the pattern
// sees all between its own key and the furthest, there is nothing to go around. Number 0 is the token's own.
#pragma once

#include "attention/attention.h"

namespace dalle {

// What a step depends on: the pattern, and the slots of its cache.
struct DecodePattern {
  PatternKind kind;
  int text_len, height, width, slots;
  int numbers;              // that image keys have, from 0 on
  int span, middle, skip;
  uint32_t one_over_span;   // (2^32 - 1) / span: exact for numbers * span < 2^32; 0 where there is no edge
};

// A place in a pattern: its own slot, the furthest that it sees, and how many columns back.
struct DecodePlace {
  int own, furthest, columns;
};

struct VisibleSlot {
  int slot;
  bool seen;
};

inline DecodePattern decode_pattern(const Pattern& pattern, int64_t slots) {
  const auto number = [](int64_t value) { return static_cast<int>(value); };
  const int height = number(pattern.height), width = number(pattern.width), size = number(pattern.kernel_size);
  DecodePattern p{pattern.kind, number(pattern.text_len), height, width, number(slots), number(slots), 1, 0, 0, 0};
  const auto go_around = [&](int span, int middle) {
    p.span = span, p.middle = middle, p.skip = width - span;
    p.one_over_span = ~0u / span;
  };
  if (pattern.kind == PatternKind::column) p.numbers = height;
  // A neighbourhood starts in mid-row, with the query; where it is as wide as the grid or wider, all are seen.
  const int reach = size / 2;
  if (pattern.kind == PatternKind::conv && 2 * reach + 1 <= width) {
    go_around(2 * reach + 1, reach);
    p.numbers = (reach + 1) * p.span - reach;
  }
  if (pattern.kind == PatternKind::conv_corner) {
    go_around(size < width ? size : width, 0);
    p.numbers = (size < height ? size : height) * p.span;
  }
  return p;
}

// The place of image token `token`.
DALLE_INLINE DecodePlace decode_place(const DecodePattern& p, int token) {
  const int row = token / p.width, column = token % p.width;
  switch (p.kind) {
    case PatternKind::column: return {column * p.height + row, row, p.height};
    case PatternKind::axial_row: return {column, column, p.width};
    case PatternKind::conv_corner: return {token % p.slots, token, column};
    default: return {token % p.slots, token, 1 << 30};
  }
}

// The slot of image key number `number`, and whether it is seen from `place`, whose own key is not.
DALLE_INLINE VisibleSlot visible_slot(const DecodePattern& p, const DecodePlace& place, int number) {
  const int rows = static_cast<int>(static_cast<uint64_t>(number + p.middle + 1) * p.one_over_span >> 32);
  const int distance = number + rows * p.skip, slot = place.own - distance;
  const bool seen = number > 0 && number < p.numbers && distance <= place.furthest;
  return {slot < 0 ? slot + p.slots : slot, seen && number - rows * p.span <= place.columns};
}

}  // namespace dalle
