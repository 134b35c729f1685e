// What QQQGemm's attributes must keep to; asked by the CUDA and CPU kernels and by the plugin.
#pragma once
#include "core/host/params.h"

namespace anybit {

inline bool qqq_bits_ok(int wbits, int levels, int abits, int act_symmetric) {
  return wbits == 4 && levels == 16 && abits == 8 && act_symmetric == 1;
}

inline bool qqq_group_ok(int group_size) {
  return group_size == 0 || group_size == 64 || group_size == 128;
}

// Whether the integer sum of a row fits 32 bits.
inline bool qqq_sum_ok(int k) { return 127 * 127 * int64_t{k} < int64_t{1} << 31; }

inline bool qqq_scheme_ok(const GemmShape& s) {
  return qqq_bits_ok(s.wbits, s.levels, s.abits, s.act_symmetric) && qqq_group_ok(s.group_size) &&
         qqq_sum_ok(s.k) && !s.has_minimum;
}

}  // namespace anybit
