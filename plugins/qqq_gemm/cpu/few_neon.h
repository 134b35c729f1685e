// QQQGemm for a few tokens with NEON's dot product.
//
// 16 bytes are the words of output channels i, i + 8, i + 16 ... of a block of 64 and of 4 input
// channels: 32-bit lane j has output channels 16 j + i (b = 0) and 16 j + i + 8 (b = 1), and a token's
// 4 codes meet all lanes.
#pragma once
#include "qqq_gemm/cpu/layout.h"

namespace anybit::cpu {
namespace ANYBIT_SET {

constexpr int kQqqVectors = 8;  // of 64 bytes, of a block's packed row

// Sums of a block and a token: [i][b], lane j.
using QqqSums = int32x4_t[kQqqVectors][2];

// int8 weights by nibble: [i][b], of channels 16 j + 8 b + i, j = 0 .. 3, side by side.
using QqqFewTables = uint8x16x4_t[kQqqVectors][2];

template <class Weights>
inline void qqq_few_tables(const Weights& w, int64_t group, int64_t block, QqqFewTables& tables) {
  for (int half = 0; half < 2; ++half) {
    uint8_t of_half[kPanelRows][16];
    qqq_tables(w, group, block, 2 * half, of_half);
    for (int c = 0; c < kPanelRows; ++c)
      tables[c % 8][c / 8 % 2].val[2 * half + c / 16] = vld1q_u8(of_half[c]);
  }
}

// 16 codes of a token; those of a group's words in the order r = 0, 2, 1, 3.
using QqqCodes = int8x16_t;

template <bool kGrouped>
ANYBIT_INLINE QqqCodes qqq_codes(const int8_t* from) {
  const int8x16_t codes = vld1q_s8(from);
  if (!kGrouped) return codes;
  const uint8x16_t order = {0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15};
  return vqtbl1q_s8(codes, order);
}

// The weights of 16 bytes of words with b = 0 and with b = 1: of a group by tables, else 16 times as
// large.
template <bool kGrouped>
ANYBIT_INLINE void qqq_weights(const uint8_t* words, const uint8x16x4_t (&tables)[2],
                               int8x16_t (&weights)[2]) {
  const uint8x16_t w = vld1q_u8(words);
  if constexpr (kGrouped) {
    const uint8x16_t low = vandq_u8(w, vdupq_n_u8(15)), high = vshrq_n_u8(w, 4);
    const uint8x16_t channel = {0, 0, 0, 0, 16, 16, 16, 16, 32, 32, 32, 32, 48, 48, 48, 48};
    weights[0] =
        vreinterpretq_s8_u8(vqtbl4q_u8(tables[0], vorrq_u8(vtrn1q_u8(low, high), channel)));
    weights[1] =
        vreinterpretq_s8_u8(vqtbl4q_u8(tables[1], vorrq_u8(vtrn2q_u8(low, high), channel)));
  } else {
    weights[0] = vreinterpretq_s8_u8(vandq_u8(w, vdupq_n_u8(0xf0)));
    weights[1] = vreinterpretq_s8_u8(vshlq_n_u8(w, 4));
  }
}

// Words of input channels 4 kLane to 4 kLane + 3.
template <int kLane, int kTokens, bool kGrouped>
ANYBIT_INLINE void qqq_add(const uint8_t* words, const QqqCodes* codes,
                           const uint8x16x4_t (&tables)[2], int32x4_t (&totals)[kTokens][2]) {
  int8x16_t weights[2];
  qqq_weights<kGrouped>(words + 16 * kLane, tables, weights);
  for (int m = 0; m < kTokens; ++m) {
    totals[m][0] = vdotq_laneq_s32(totals[m][0], weights[0], codes[m], kLane);
    totals[m][1] = vdotq_laneq_s32(totals[m][1], weights[1], codes[m], kLane);
  }
}

// kRows packed rows of one block times kTokens tokens, whose codes are [kRows][kTokens]. Those of a
// later block, `ahead` bytes away, are fetched meanwhile.
template <int kTokens, bool kGrouped, int kRows>
inline void qqq_chunk(const uint8_t* words, int64_t row_stride, int64_t ahead,
                      const QqqCodes* codes, const QqqFewTables& tables, QqqSums* sums) {
  for (int i = 0; i < kQqqVectors; ++i, words += 64) {
    int32x4_t totals[kTokens][2] = {};
    for (int row = 0; row < kRows; ++row) {
      const uint8_t* from = words + row * row_stride;
      const QqqCodes* of_row = codes + row * kTokens;
      __builtin_prefetch(from + ahead);
      qqq_add<0, kTokens, kGrouped>(from, of_row, tables[i], totals);
      qqq_add<1, kTokens, kGrouped>(from, of_row, tables[i], totals);
      qqq_add<2, kTokens, kGrouped>(from, of_row, tables[i], totals);
      qqq_add<3, kTokens, kGrouped>(from, of_row, tables[i], totals);
    }
    for (int m = 0; m < kTokens; ++m) {
      for (int b = 0; b < 2; ++b) {
        const int32x4_t total = kGrouped ? totals[m][b] : vshrq_n_s32(totals[m][b], 4);
        sums[m][i][b] = vaddq_s32(sums[m][i][b], total);
      }
    }
  }
}

// Sums in the order of a block's 64 output channels.
ANYBIT_INLINE void qqq_collect(const QqqSums& sums, int32_t* to) {
  for (int c = 0; c < kQqqBlock; ++c) to[c] = sums[c % 8][c / 8 % 2][c / 16];
}

}  // namespace ANYBIT_SET
}  // namespace anybit::cpu
