// A tensor's shape as kernels see it: sizes and strides, in elements, outermost first.
#pragma once

#include <cstdint>

#include "common/target.h"

namespace dalle {

struct Strided {
  static constexpr int MAX_DIMS = 8;
  int dims;  // at least 1 and at most MAX_DIMS once `merged`
  int64_t sizes[MAX_DIMS];
  int64_t strides[MAX_DIMS];
};

}  // namespace dalle

namespace dalle::DALLE_ISA_NAMESPACE {

// How many elements there are.
DALLE_INLINE int64_t element_count(const Strided& shape) {
  int64_t count = 1;
  for (int d = 0; d < shape.dims; ++d) count *= shape.sizes[d];
  return count;
}

// The elements in one row: along the innermost dimension.
DALLE_INLINE int64_t row_length(const Strided& shape) { return shape.sizes[shape.dims - 1]; }

// Where row number `row` begins.
DALLE_INLINE int64_t row_offset(const Strided& shape, int64_t row) {
  int64_t offset = 0;
  for (int d = shape.dims - 2; d >= 0; --d) {
    offset += (row % shape.sizes[d]) * shape.strides[d];
    row /= shape.sizes[d];
  }
  return offset;
}

DALLE_INLINE bool is_contiguous(const Strided& shape) { return shape.dims == 1 && shape.strides[0] == 1; }

// The same elements in the same order in as few dimensions as possible: size 1 goes, neighbours that follow each other
// in memory join. A contiguous tensor of any rank comes out as one dimension of stride 1.
DALLE_INLINE Strided merged(const Strided& shape) {
  Strided out{1, {1}, {1}};
  bool first = true;
  for (int d = 0; d < shape.dims; ++d) {
    if (shape.sizes[d] == 1) continue;
    const int last = out.dims - 1;
    if (first) {
      out.sizes[0] = shape.sizes[d];
      out.strides[0] = shape.strides[d];
      first = false;
    } else if (out.strides[last] == shape.sizes[d] * shape.strides[d]) {
      out.sizes[last] *= shape.sizes[d];
      out.strides[last] = shape.strides[d];
    } else {
      out.sizes[out.dims] = shape.sizes[d];
      out.strides[out.dims] = shape.strides[d];
      ++out.dims;
    }
  }
  return out;
}

}  // namespace dalle::DALLE_ISA_NAMESPACE
