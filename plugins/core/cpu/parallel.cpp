// Asks the operating system for the cores.
#include "core/cpu/parallel.h"

#include <thread>
#if defined(__linux__)
#include <sched.h>
#endif

namespace anybit::cpu {

namespace {

int asked_cores() {
#if defined(__linux__)
  cpu_set_t cores;
  if (sched_getaffinity(0, sizeof cores, &cores) == 0) return CPU_COUNT(&cores);
#endif
  const unsigned count = std::thread::hardware_concurrency();
  return count == 0 ? 1 : int(count);
}

}  // namespace

// Asked once: a kernel asks at every call.
int bound_cores() {
  static const int cores = asked_cores();
  return cores;
}

}  // namespace anybit::cpu
