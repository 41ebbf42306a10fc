// Stands for the driver's header: a tensor map is what it was made of.
#pragma once

#include <cstdint>

struct CUtensorMap {
  const void* data;
  uint64_t sizes[5], strides[4];
  uint32_t box[5];
};
