// Arithmetic of sizes, in functions of this build alone (isa.h says why not the standard library's).
#pragma once

#include <cstdint>

#include "common/target.h"

namespace dalle::DALLE_ISA_NAMESPACE {

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t quotient_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t rounded_up(int64_t a, int64_t b) { return quotient_up(a, b) * b; }

}  // namespace dalle::DALLE_ISA_NAMESPACE
