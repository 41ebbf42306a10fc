// Stands for csrc/common/pairs.h, whose contracts these functions keep.
#pragma once

#include <cuda_runtime.h>

#include "common/dtype.h"

namespace dalle::cuda {

using plain::from_float, plain::to_float;

struct alignas(16) FourPairs {
  uint32_t pairs[4];
};

template <class Element>
uint32_t rounded_pair(float first, float second, Element) {
  Element numbers[2];
  from_float(first, numbers[0]), from_float(second, numbers[1]);
  return numbers[0].bits | static_cast<uint32_t>(numbers[1].bits) << 16;
}
template <class Element>
float2 numbers_of(uint32_t pair, Element) {
  return {to_float(Element{static_cast<uint16_t>(pair)}), to_float(Element{static_cast<uint16_t>(pair >> 16)})};
}
template <class Element>
FourPairs rounded_pairs(const float (&numbers)[8], Element) {
  FourPairs rounded;
  for (int i = 0; i < 4; ++i) rounded.pairs[i] = rounded_pair(numbers[2 * i], numbers[2 * i + 1], Element{});
  return rounded;
}
template <class Element>
void numbers_of(const FourPairs& four, float (&numbers)[8], Element) {
  for (int i = 0; i < 8; ++i) {
    const float2 two = numbers_of(four.pairs[i / 2], Element{});
    numbers[i] = i % 2 == 0 ? two.x : two.y;
  }
}
template <int WHICH>
uint32_t pair_of(uint32_t first, uint32_t second) {
  return (first >> 16 * WHICH & 0xffff) | second >> 16 * WHICH << 16;
}

}  // namespace dalle::cuda
