// The compiler's intrinsics, for the builds that have them; some releases of GCC warn that their own intrinsics read a
// register that they leave undefined on purpose.
#pragma once

#if defined(__AVX2__) && !defined(__CUDACC__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif
