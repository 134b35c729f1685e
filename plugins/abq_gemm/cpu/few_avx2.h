// ABQGemm for a few tokens with AVX2, and with AVX-512 where groups are not lanes of it: a word of each
// plane at a time becomes 32 codes.
#pragma once
#include "abq_gemm/cpu/weights.h"

namespace anybit::cpu {
namespace ANYBIT_SET {

ANYBIT_INLINE int32_t added_up(__m256i v) {
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}

// Sums of products of row n with every operand; the sums of group g and operand i go to
// sums[g * kOperands + i][column].
//
// Products of codes up to 127 do not saturate 16 bits in pairs; the eighth plane is summed apart.
template <int kOperands>
inline void abq_word_row(const AbqRows& w, int64_t n, int column, Sums* sums) {
  const uint8_t* row = w.words + n * w.row_bytes;
  const __m256i bytes =
      _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i bit = _mm256_set1_epi64x(int64_t(0x8040201008040201));
  const __m256i ones = _mm256_set1_epi16(1), one = _mm256_set1_epi8(1);
  const int64_t words = w.group_bytes / kAbqWord;
  const int8_t* operand = w.operands;
  for (int64_t group = 0; group < w.n_groups; ++group) {
    __m256i totals[kOperands] = {}, eighths[kOperands] = {};
    for (int64_t word = 0; word < words; ++word, row += 4, operand += kAbqWord) {
      // all bits set where a plane has a 1
      const auto plane = [&](int j) {
        int32_t packed;
        std::memcpy(&packed, row + j * w.plane_bytes, sizeof packed);
        const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32(packed), bytes);
        return _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit);
      };
      __m256i codes = _mm256_setzero_si256();
      for (int j = smaller(w.planes, 7) - 1; j >= 0; --j)
        codes = _mm256_sub_epi8(_mm256_add_epi8(codes, codes), plane(j));
      const auto product = [&](__m256i weights, int i) {
        const __m256i x =
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(operand + i * w.operand_bytes));
        return _mm256_madd_epi16(_mm256_maddubs_epi16(weights, x), ones);
      };
      for (int i = 0; i < kOperands; ++i)
        totals[i] = _mm256_add_epi32(totals[i], product(codes, i));
      if (w.planes < 8) continue;
      const __m256i eighth = _mm256_and_si256(plane(7), one);
      for (int i = 0; i < kOperands; ++i)
        eighths[i] = _mm256_add_epi32(eighths[i], product(eighth, i));
    }
    for (int i = 0; i < kOperands; ++i)
      sums[group * kOperands + i][column] =
          added_up(_mm256_add_epi32(totals[i], _mm256_slli_epi32(eighths[i], 7)));
  }
}

#if !defined(__AVX512VNNI__)
// A token's codes as abq_few_rows() wants them.
inline void abq_few_order(const TokenLayout& layout, const int8_t* codes, int, int8_t* ordered) {
  std::memcpy(ordered, codes, size_t(layout.row_bytes));
}

// Sums of up to 32 rows from n on.
template <int kOperands>
ANYBIT_INLINE void abq_few_rows(const AbqRows& w, const TokenLayout&, int64_t n, int columns,
                                Sums* sums) {
  for (int column = 0; column < columns; ++column)
    abq_word_row<kOperands>(w, n + column, column, sums);
}
#endif

}  // namespace ANYBIT_SET
}  // namespace anybit::cpu
