// Stands for csrc/common/instructions.h, whose contracts these functions keep. What may be off is: by one unit in the
// last place, up, down or not at all.
#pragma once

#include <cuda_runtime.h>

#include <cfloat>

#include "common/dtype.h"

namespace dalle {

// C's may make a quiet NaN of a signaling one, and take 0 for -0. A GPU's pass over both, and know the order.
inline float fminf(float a, float b) { return std::isnan(a) || b < a || (b == a && std::signbit(b)) ? b : a; }
inline float fmaxf(float a, float b) { return std::isnan(a) || b > a || (b == a && std::signbit(a)) ? b : a; }

}  // namespace dalle

namespace dalle::cuda {

inline void multiply_wide(uint32_t a, uint32_t b, uint32_t& low, uint32_t& high) {
  const uint64_t product = static_cast<uint64_t>(a) * b;
  low = static_cast<uint32_t>(product), high = static_cast<uint32_t>(product >> 32);
}

inline float flushed(float x) { return std::fabs(x) < FLT_MIN ? std::copysign(0.0f, x) : x; }

// The result of an instruction given `x`.
inline float rough(double result, float x) {
  const float nearest = static_cast<float>(result);
  switch ((__float_as_uint(x) * 0x9E3779B9u >> 16) % 3) {
    case 0: return flushed(std::nextafterf(nearest, INFINITY));
    case 1: return flushed(std::nextafterf(nearest, -INFINITY));
    default: return flushed(nearest);
  }
}
inline float fast_exp2(float x) { return rough(std::exp2(static_cast<double>(flushed(x))), x); }
inline float fast_log2(float x) { return rough(std::log2(static_cast<double>(flushed(x))), x); }
inline float fast_reciprocal(float x) { return rough(1 / static_cast<double>(flushed(x)), x); }
inline float fast_reciprocal_root(float x) { return rough(1 / std::sqrt(static_cast<double>(flushed(x))), x); }

inline float float_of_half(uint16_t bits) { return plain::to_float(Half{bits}); }
inline uint16_t half_towards_zero(float x) {
  Half nearest;
  plain::from_float(x, nearest);
  const bool above = std::fabs(plain::to_float(nearest)) > std::fabs(x);
  return static_cast<uint16_t>(nearest.bits - above);
}

}  // namespace dalle::cuda
