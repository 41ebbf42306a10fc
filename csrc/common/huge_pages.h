// Fewer page faults for large fresh outputs.
#pragma once

#include <cstdint>

#include "common/target.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace dalle::DALLE_ISA_NAMESPACE {

// Asks the system to back fresh memory that is about to be written with large pages. Memory this big comes from the
// system with every allocation and goes back with every free: in pages of 4 KiB the faults take longer than any kernel
// that only streams through it. No more than a hint, and none where the range holds no large page.
DALLE_INLINE void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t HUGE_PAGE = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / HUGE_PAGE * HUGE_PAGE;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace dalle::DALLE_ISA_NAMESPACE
