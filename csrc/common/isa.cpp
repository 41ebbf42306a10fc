#include "common/isa.h"

#include <atomic>
#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace dalle {
namespace {

constexpr const char* NAMES[ISA_COUNT] = {"portable", "avx2", "avx512", "avx512_bf16"};

#if defined(__x86_64__)

struct Registers {
  uint32_t eax, ebx, ecx, edx;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers r{0, 0, 0, 0};
  if (!__get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx)) return {0, 0, 0, 0};
  return r;
}

// Which register files the operating system saves on a task switch (XCR0); without them the instructions fault.
uint64_t enabled_state() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

bool has(uint32_t word, int bit) { return (word >> bit) & 1; }

Isa detect() {
  const Registers basic = cpuid(1, 0), extended = cpuid(7, 0), further = cpuid(7, 1);
  constexpr int OSXSAVE = 27, AVX = 28, FMA = 12, F16C = 29, AVX2 = 5;
  constexpr int AVX512F = 16, AVX512DQ = 17, AVX512BW = 30, AVX512VL = 31, AVX512_BF16 = 5;
  constexpr uint64_t YMM_STATE = 0x6, ZMM_STATE = 0xe6;
  if (!has(basic.ecx, OSXSAVE) || !has(basic.ecx, AVX)) return Isa::portable;
  const uint64_t state = enabled_state();
  const bool avx2 = has(basic.ecx, FMA) && has(basic.ecx, F16C) && has(extended.ebx, AVX2);
  if (!avx2 || (state & YMM_STATE) != YMM_STATE) return Isa::portable;
#if defined(DALLE_EMULATE)
  return Isa::avx512_bf16;  // whose builds are made of AVX2 instructions here: emulate.h
#endif
  const bool avx512 = has(extended.ebx, AVX512F) && has(extended.ebx, AVX512DQ) && has(extended.ebx, AVX512BW) &&
                      has(extended.ebx, AVX512VL);
  if (!avx512 || (state & ZMM_STATE) != ZMM_STATE) return Isa::avx2;
  return has(further.eax, AVX512_BF16) ? Isa::avx512_bf16 : Isa::avx512;
}

#else

Isa detect() { return Isa::portable; }

#endif

Isa widest() {
  Isa isa = detect();
  while (!isa_built(isa)) isa = static_cast<Isa>(static_cast<int>(isa) - 1);
  return isa;
}

std::atomic<Isa>& used() {
  static std::atomic<Isa> isa{widest()};
  return isa;
}

}  // namespace

const char* isa_name(Isa isa) { return NAMES[static_cast<int>(isa)]; }

bool isa_built(Isa isa) {
  constexpr const void* here = &NAMES;
  const void* const built[ISA_COUNT] = {here, DALLE_IF_AVX2(here), DALLE_IF_AVX512(here), DALLE_IF_AVX512_BF16(here)};
  return built[static_cast<int>(isa)] != nullptr;
}

bool isa_supported(Isa isa) {
  static const Isa detected = detect();
  return static_cast<int>(isa) <= static_cast<int>(detected);
}

Isa isa_used() { return used().load(std::memory_order_relaxed); }

void isa_force(Isa isa) { used().store(isa, std::memory_order_relaxed); }

}  // namespace dalle
