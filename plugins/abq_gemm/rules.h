// What ABQGemm's attributes must keep to; asked by the CUDA and CPU kernels and by the plugin.
#pragma once
#include "core/host/params.h"

namespace anybit {

constexpr int kAbqWeightOnly = 16;  // abits: activations stay floating point
constexpr int kAbqMostPlanes = 8;

// All codes of wbits bits, or one more than these, balanced around 0: 5 with 2 bits, 3 with 1.
inline bool abq_levels_ok(int wbits, int levels) {
  if (wbits < 1 || wbits > 8) return false;
  return levels == 1 << wbits || (wbits == 2 && levels == 5) || (wbits == 1 && levels == 3);
}

inline bool abq_abits_ok(int abits) {
  return (abits >= 2 && abits <= 8) || abits == kAbqWeightOnly;
}

// Largest integer sum of a group in magnitude, which must fit 32 bits.
inline int64_t abq_largest_sum(int levels, int64_t group_len) {
  return 128 * int64_t{levels - 1} * group_len;
}

// All of these, and just enough planes for the largest code.
inline bool abq_scheme_ok(const GemmShape& s) {
  if (!abq_levels_ok(s.wbits, s.levels) || !abq_abits_ok(s.abits)) return false;
  if (s.planes < 1 || s.planes > kAbqMostPlanes) return false;
  if ((s.levels - 1) >> (s.planes - 1) != 1) return false;
  const int64_t group_len = s.group_size ? s.group_size : s.k;
  return s.abits == kAbqWeightOnly || abq_largest_sum(s.levels, group_len) < int64_t{1} << 31;
}

// Whether the weights are there, in the form that the shape says.
inline bool abq_has_inputs(const GemmShape& s, const GemmBuffers& b) {
  return b.weight && b.scale && (s.has_minimum ? b.minimum != nullptr : b.zero != nullptr);
}

}  // namespace anybit
