// ABQGemm's weights as the file has them.
#pragma once
#include "abq_gemm/cpu/layout.h"

namespace anybit::cpu {
namespace ANYBIT_SET {

struct AbqWeights {
  int64_t n, group_words, row_words;
  int planes;
  const uint8_t* words;  // uint32 [planes, n, row_words]
  const float* scale;    // [n, n_groups]
  const int32_t* zero;   // [n, n_groups], or null
  const float* minimum;  // [n, n_groups] where there is no zero, or null

  ANYBIT_INLINE const uint8_t* row(int plane, int64_t channel) const {
    return words + 4 * ((plane * n + channel) * row_words);
  }
  // Zero points or minimums, 4 bytes each.
  ANYBIT_INLINE const char* offsets() const {
    return reinterpret_cast<const char*>(zero ? static_cast<const void*>(zero) : minimum);
  }
};

// What the sums of a few tokens are made from.
struct AbqRows {
  const uint8_t* words;
  const float* scale;   // [n, n_groups], wanted soon, and the zero points or minimums too
  const char* offsets;  // 4 bytes each
  int64_t n, row_bytes, plane_bytes;  // bytes of a row and of a plane
  int planes;
  const int8_t* operands;  // codes [kOperands, operand_bytes]: tokens, and ones for Q
  int64_t operand_bytes;
  int64_t n_groups, group_bytes;  // of the codes
};

constexpr int kAbqGroupsTogether = 4;

// Scales and zero points or minimums of a group and the output channels of a panel.
struct AbqGroupTerms {
  alignas(64) float scale[kPanelRows];
  alignas(64) int32_t zero[kPanelRows];   // 0 where there is a minimum
  alignas(64) float minimum[kPanelRows];  // where there is one
  uint32_t largest_zero;                  // in magnitude

  ANYBIT_INLINE void set_largest_zero() {
    largest_zero = 0;
    for (int i = 0; i < kPanelRows; ++i) {
      const uint32_t value = uint32_t(zero[i]), magnitude = zero[i] < 0 ? 0 - value : value;
      largest_zero = magnitude > largest_zero ? magnitude : largest_zero;
    }
  }
};

// Channels beyond the last repeat it.
ANYBIT_INLINE void abq_terms(const AbqWeights& w, int64_t n_groups, int64_t group, int64_t n0,
                             AbqGroupTerms& terms) {
  for (int i = 0; i < kPanelRows; ++i) {
    const int64_t at = smaller(n0 + i, w.n - 1) * n_groups + group;
    terms.scale[i] = w.scale[at];
    terms.zero[i] = w.zero ? w.zero[at] : 0;
    if (w.minimum) terms.minimum[i] = w.minimum[at];
  }
  terms.set_largest_zero();
}

}  // namespace ANYBIT_SET
}  // namespace anybit::cpu
