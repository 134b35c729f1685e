// Asks the processor for its instruction sets, and the environment which to use.
#include "core/cpu/isa.h"

#include <cstdlib>

#include "core/cpu/has_tiles.h"

#if defined(ANYBIT_HAS_TILES) && !defined(ANYBIT_EMULATED_TILES)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace anybit::cpu {
namespace {

constexpr const char* kNames[kIsaCount] = {
    "portable",
#if defined(__aarch64__)
    "neon",
#else
    "avx2",
    "avx512",
    "amx",
#endif
};

std::string names_up_to(Isa best) {
  std::string names = kNames[kPortable];
  for (int isa = kPortable + 1; isa <= best; ++isa) names += std::string(", ") + kNames[isa];
  return names;
}

#if defined(__x86_64__)
// Whether this process may use int8 tiles from now on; asked where there is AVX-512.
bool takes_tiles() {
#if defined(ANYBIT_EMULATED_TILES)
  return true;
#elif defined(ANYBIT_HAS_TILES)
  unsigned a, b, c, d;
  constexpr unsigned kTiles = 1u << 24, kInt8 = 1u << 25;  // of leaf 7, EDX
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kTiles) || !(d & kInt8)) return false;
  // Palette 1 must be what tiles.h sets up: rows of 64 bytes, 8 tiles, 16 rows. A virtual machine may
  // show the instructions and not this leaf.
  if (!__get_cpuid_count(0x1d, 1, &a, &b, &c, &d)) return false;
  if ((b & 0xffff) < 64 || b >> 16 < 8 || (c & 0xffff) < 16) return false;
  // both parts of the tiles' state, which the operating system must be ready to save
  constexpr unsigned kState = 1u << 17 | 1u << 18;
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low & kState) != kState) return false;
  constexpr long kAskForState = 0x1023,
                 kTileData = 18;  // ARCH_REQ_XCOMP_PERM, Linux 5.16 and later
  return syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
#else
  return false;
#endif
}
#endif

Isa asked_isa() {
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
  if (avx2 && avx512) return takes_tiles() ? kAmx : kAvx512;
  return avx2 ? kAvx2 : kPortable;
#elif defined(__aarch64__) && defined(__linux__)
  constexpr unsigned long kDotProduct = 1ul << 20;  // HWCAP_ASIMDDP
  return getauxval(AT_HWCAP) & kDotProduct ? kNeon : kPortable;
#else
  return kPortable;
#endif
}

}  // namespace

const char* name_of(Isa isa) { return kNames[isa]; }

Isa best_isa() {
  static const Isa best = asked_isa();
  return best;
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
