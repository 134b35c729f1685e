// How ABQGemm's tokens lie in the workspace: groups in whole words, as in the weights.
#pragma once
#include "abq_gemm/rules.h"
#include "core/cpu/gemm.h"

namespace anybit::cpu {
namespace ANYBIT_SET {

constexpr int kAbqWord = 32;       // codes
constexpr int kAbqTogether = 5;    // tokens, or tokens and ones, that meet weights as they are read
constexpr int kAbqFewTokens = 12;  // in turn, while the weights are near, before panels pay
// The tokens in another order, and ones behind each four of them.
constexpr int kAbqMoreRows = kAbqFewTokens / 4 * kAbqTogether;

ANYBIT_INLINE TokenLayout abq_layout(const GemmShape& s) {
  return token_layout(s.k, s.group_size ? s.k / s.group_size : 1, kAbqWord);
}

// Codes of an element of a token (core/cpu/tokens.h): several where A16 leaves activations as they are,
// and 0 where so the integer sums of a group would leave 32 bits, and everything is done in fp32.
ANYBIT_INLINE int abq_digits(const GemmShape& s) {
  if (s.abits != kAbqWeightOnly) return 1;
  const int64_t group_len = s.group_size ? s.group_size : s.k;
  if (abq_largest_sum(s.levels, group_len) >= int64_t{1} << 31) return 0;
  return s.dtype == kFloat32 ? 4 : 3;
}

ANYBIT_INLINE size_t abq_slab_bytes(const GemmShape& s) {
  return slab_memory(abq_layout(s), int64_t{s.m} * abq_digits(s), kAbqMoreRows, nullptr).bytes;
}

// fp32 tokens of a slab, of A16.
ANYBIT_INLINE Carver abq_float_memory(const GemmShape& s, void* memory, float** rows) {
  Carver carver{static_cast<char*>(memory)};
  *rows = carver.take<float>(smaller<int64_t>(s.m > 1 ? s.m : 1, kSlab) * s.k);
  return carver;
}

}  // namespace ANYBIT_SET
}  // namespace anybit::cpu
