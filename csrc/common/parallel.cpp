// Threads without an OpenMP runtime of our own.
//
// A process with two OpenMP runtimes has two thread pools, which compete for the cores, and torch brings one already:
// its wheels carry a libgomp of their own (under names that have changed between releases), other distributions an
// Intel or LLVM runtime. Linking one here, or compiling with -fopenmp, could load a second. Instead the entry point
// that all of these runtimes export on Linux, GOMP_parallel, is looked up among the libraries in the process: `import
// torch` (which comes first, see dalle_kernels/_native.py) has put its runtime there. So torch and these kernels share
// one pool of threads, and a build needs no OpenMP at all. Where none is found (macOS, a torch without OpenMP) the
// loops run on the calling thread.
#include "common/parallel.h"

#include <dlfcn.h>

namespace dalle {
namespace {

struct Runtime {
  void (*parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags) = nullptr;
  int (*thread)() = nullptr;
  int (*team)() = nullptr;
};

template <class Function>
bool find(void* library, const char* name, Function*& function) {
  function = reinterpret_cast<Function*>(dlsym(library, name));
  return function != nullptr;
}

bool load(void* library, Runtime& runtime) {
  const bool complete = find(library, "GOMP_parallel", runtime.parallel) &&
                        find(library, "omp_get_thread_num", runtime.thread) &&
                        find(library, "omp_get_num_threads", runtime.team);
  if (!complete) runtime = Runtime{};
  return complete;
}

Runtime look_up() {
  Runtime runtime;
  if (load(RTLD_DEFAULT, runtime)) return runtime;
  // Loaded, but not for everyone's use: RTLD_NOLOAD finds such a library and never loads one.
  constexpr const char* NAMES[] = {"libgomp.so.1", "libiomp5.so", "libomp.so", "libomp.so.5"};
  for (const char* name : NAMES) {
    void* library = dlopen(name, RTLD_LAZY | RTLD_NOLOAD);
    if (library != nullptr && load(library, runtime)) return runtime;
  }
  return runtime;
}

const Runtime& runtime() {
  static const Runtime found = look_up();
  return found;
}

struct Call {
  void (*body)(void* context, int thread, int team);
  void* context;
};

}  // namespace

bool has_openmp() { return runtime().parallel != nullptr; }

void run_team(int threads, void (*body)(void* context, int thread, int team), void* context) {
  if (threads <= 1 || !has_openmp()) return body(context, 0, 1);
  Call call{body, context};
  runtime().parallel(
      [](void* data) {
        const Call& c = *static_cast<const Call*>(data);
        c.body(c.context, runtime().thread(), runtime().team());
      },
      &call, static_cast<unsigned>(threads), 0);
}

}  // namespace dalle
