// What the two Python modules share: turning Python's arguments into parameter structs, and statuses into exceptions.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/strided.h"

namespace dalle {

// Addresses come as integers (torch's data_ptr()).
template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline Strided strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  if (sizes.size() != strides.size() || sizes.size() > static_cast<size_t>(Strided::MAX_DIMS)) {
    throw std::invalid_argument("expected as many sizes as strides, at most " + std::to_string(Strided::MAX_DIMS) +
                                ", got " + std::to_string(sizes.size()) + " and " + std::to_string(strides.size()));
  }
  Strided shape{static_cast<int>(sizes.size()), {}, {}};
  for (size_t d = 0; d < sizes.size(); ++d) {
    shape.sizes[d] = sizes[d];
    shape.strides[d] = strides[d];
  }
  return shape;
}

inline void check(const char* kernel, const char* status) {
  if (status != nullptr) throw std::runtime_error(std::string(kernel) + ": " + status);
}

}  // namespace dalle
