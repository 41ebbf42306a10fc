// Instruction sets: which builds of the kernels there are, which of them this processor runs, and which one is used.
//
// A kernel source is compiled once per instruction set, with DALLE_ISA_NAMESPACE set to the build's name, and puts all
// of its code into that namespace. Code outside of it could be merged by the linker with the same function from a wider
// build and then fault on an older processor: so kernel sources use raw loops, file-local functions and the headers of
// this folder, and no template of the standard library that leaves a function behind.
#pragma once

namespace dalle {

// From the plainest to the widest; a wider one includes all before it.
enum class Isa : int { portable, avx2, avx512, avx512_bf16 };
constexpr int ISA_COUNT = 4;

const char* isa_name(Isa isa);
bool isa_built(Isa isa);      // this library holds the build
bool isa_supported(Isa isa);  // processor and operating system run it
Isa isa_used();               // the widest one built and supported, unless isa_force chose another
void isa_force(Isa isa);      // must be built and supported

// Takes the build of a kernel that fits: one address per instruction set, nullptr where it is not built.
template <class Kernel>
Kernel* isa_choose(Kernel* const (&builds)[ISA_COUNT]) {
  return builds[static_cast<int>(isa_used())];
}

}  // namespace dalle

// In a family's header: declares the kernel `const char* name(const Params&)` of every build. A kernel returns nullptr,
// or a sentence that says why it did nothing. One that does not multiply BFloat16 itself would come out the same from
// both builds for AVX-512, so it is built for the first of them alone.
#define DALLE_DECLARE_CPU_KERNEL(name, Params)                  \
  DALLE_DECLARE_SHARED_CPU_BUILDS(name, Params)                 \
  namespace avx512_bf16 {                                       \
  using avx512::name;                                           \
  }

// The same of a kernel with such products, whose source CMakeLists.txt names in BF16_SOURCES.
#define DALLE_DECLARE_CPU_KERNEL_WITH_BF16(name, Params)        \
  DALLE_DECLARE_SHARED_CPU_BUILDS(name, Params)                 \
  namespace avx512_bf16 {                                       \
  const char* name(const Params&);                              \
  }

#define DALLE_DECLARE_SHARED_CPU_BUILDS(name, Params)           \
  namespace portable {                                          \
  const char* name(const Params&);                              \
  }                                                             \
  namespace avx2 {                                              \
  const char* name(const Params&);                              \
  }                                                             \
  namespace avx512 {                                            \
  const char* name(const Params&);                              \
  }

// In module.cpp: the build of a kernel that fits this processor.
#if defined(DALLE_BUILT_AVX2)
#define DALLE_IF_AVX2(address) address
#else
#define DALLE_IF_AVX2(address) nullptr
#endif
#if defined(DALLE_BUILT_AVX512)
#define DALLE_IF_AVX512(address) address
#else
#define DALLE_IF_AVX512(address) nullptr
#endif
#if defined(DALLE_BUILT_AVX512_BF16)
#define DALLE_IF_AVX512_BF16(address) address
#else
#define DALLE_IF_AVX512_BF16(address) nullptr
#endif
#define DALLE_CPU_KERNEL(name)                                                                       \
  ::dalle::isa_choose<decltype(::dalle::portable::name)>(                                            \
      {&::dalle::portable::name, DALLE_IF_AVX2(&::dalle::avx2::name),                                \
       DALLE_IF_AVX512(&::dalle::avx512::name), DALLE_IF_AVX512_BF16(&::dalle::avx512_bf16::name)})
