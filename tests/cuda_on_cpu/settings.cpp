// What tests set of the GPU that the CPU stands for.
#include <cuda_runtime.h>

#define DALLE_SETTING extern "C" __attribute__((visibility("default"))) void

// Another device than all before, for what is asked of a device once.
DALLE_SETTING set_device(int major, int minor, int code, int shared) {
  const int number = on_cpu::device.number + 1;
  on_cpu::device = {};
  on_cpu::device.number = number, on_cpu::device.major = major, on_cpu::device.minor = minor;
  on_cpu::device.code = code, on_cpu::device.shared = shared;
}

// Which launches are held back, of all from now on: those of even numbers, of odd ones, or, by -1, none.
DALLE_SETTING hold_back(int which) {
  on_cpu::end_pending();
  on_cpu::held_back = which, on_cpu::chained = 0;
}
