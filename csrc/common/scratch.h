// Scratch space for each of some threads, or for all together: one allocation, whose parts begin with a cache line.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "common/target.h"

namespace dalle::DALLE_ISA_NAMESPACE {

class Scratch {
 public:
  Scratch(int threads, int64_t floats)
      : floats_((floats + 15) / 16 * 16), data_(static_cast<float*>(aligned_alloc(64, 4 * (threads * floats_ + 16)))) {}
  ~Scratch() { free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  bool failed() const { return data_ == nullptr; }
  float* of(int thread) const { return data_ + thread * floats_; }

 private:
  int64_t floats_;
  float* data_;
};

}  // namespace dalle::DALLE_ISA_NAMESPACE
