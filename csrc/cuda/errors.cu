#include "interface.h"
#include "platform.h"

extern "C" const char* crossan_error(int code) {
  switch (code) {
    case kCrossanBadSize: return "a size is out of range";
    case kCrossanBadKind: return "an element type is not supported here";
    case kCrossanTooLarge: return "more elements than the kernel can address";
    case kCrossanBadPath: return "the path that was asked for needs another GPU";
    default: return crossan_fast::launch_error(code);
  }
}

extern "C" int crossan_architecture() { return crossan_fast::device_limits().architecture; }

#if !defined(__CUDACC__)
// For tests: the order in which the emulator runs threads, and the device that it stands for.
extern "C" void crossan_emulate(unsigned seed, int architecture, int multiprocessors, int shared_per_block) {
  crossan_fast::shim::seed = seed;
  crossan_fast::emulated_device = {architecture, multiprocessors, shared_per_block};
}
#endif
