// Which instruction set the CPU kernels use: the best that the machine has, or a lower one that
// ANYBIT_CPU names.
#pragma once
#include <string>

namespace anybit::cpu {

// Of this architecture, from the plainest to the best; each machine runs those up to its own.
enum Isa : int {
  kPortable,  // plain C++17
#if defined(__aarch64__)
  kNeon,  // the dot product of int8 (Armv8.2)
#else
  kAvx2,    // AVX2, FMA, F16C
  kAvx512,  // AVX-512 F, BW, DQ, VL, VBMI and VNNI, and GFNI
  kAmx,     // that, and AMX with int8 tiles
#endif
  kIsaCount,
};

const char* name_of(Isa isa);

// The best set that this processor and this operating system run and this library was built for. The
// first call asks Linux to let this process use AMX's tiles.
Isa best_isa();

// What calls use. `error` is not empty, in three parts, where ANYBIT_CPU names no set of this
// machine.
struct IsaChoice {
  Isa isa;
  std::string error;
};

// `wanted` is the value of ANYBIT_CPU; null or empty leaves the choice to best_isa().
IsaChoice choose_isa(const char* wanted, Isa best);

// The choice for this process, made once.
const IsaChoice& chosen_isa();

}  // namespace anybit::cpu
