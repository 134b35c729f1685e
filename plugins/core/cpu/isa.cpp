// Asks the processor for its instruction sets, and the environment which to use.
#include "core/cpu/isa.h"

#include <cstdlib>

namespace anybit::cpu {
namespace {

constexpr const char* kNames[kIsaCount] = {"portable", "avx2", "avx512"};

std::string names_up_to(Isa best) {
  std::string names = kNames[kPortable];
  for (int isa = kPortable + 1; isa <= best; ++isa) names += std::string(", ") + kNames[isa];
  return names;
}

}  // namespace

const char* name_of(Isa isa) { return kNames[isa]; }

Isa best_isa() {
#if defined(__x86_64__)
  // The compiler's run-time library asks cpuid for the instructions and xgetbv for whether the
  // operating system keeps their registers.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vbmi") &&
                      __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("gfni");
  return avx2 && avx512 ? kAvx512 : avx2 ? kAvx2 : kPortable;
#else
  return kPortable;
#endif
}

IsaChoice choose_isa(const char* wanted, Isa best) {
  if (wanted == nullptr || *wanted == '\0') return {best, ""};
  for (int isa = kPortable; isa <= best; ++isa) {
    if (std::string(wanted) == kNames[isa]) return {static_cast<Isa>(isa), ""};
  }
  return {kPortable, std::string("ANYBIT_CPU: got '") + wanted + "', expected one of " +
                         names_up_to(best) +
                         ", which this machine runs. Unset it, or set one of these."};
}

const IsaChoice& chosen_isa() {
  static const IsaChoice choice = choose_isa(std::getenv("ANYBIT_CPU"), best_isa());
  return choice;
}

}  // namespace anybit::cpu
