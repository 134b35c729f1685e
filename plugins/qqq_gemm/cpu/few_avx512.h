// QQQGemm for a few tokens with AVX-512: words are read once, straight from memory, in the order in
// which they lie.
//
// 64 bytes are the words of output channels i, i + 8, i + 16 ... of a block of 64 and of 16 input
// channels: lane kq has input channels 4 kq to 4 kq + 3, element j of it output channels 16 j + i
// (b = 0) and 16 j + i + 8 (b = 1). A token's 16 codes are therefore spread to 4 equal elements a
// lane, and the lanes of the sums are added at the end.
#pragma once
#include "qqq_gemm/cpu/layout.h"

namespace anybit::cpu {
namespace ANYBIT_SET {

constexpr int kQqqVectors = 8;  // of a block's packed row

// Sums of a block and a token: [i / 4][b], lane i % 4, element j.
using QqqSums = __m512i[2][2];
using QqqTables = __m512i[kQqqVectors][2];
using QqqFewTables = QqqTables;
// 16 of a token's, spread.
using QqqCodes = __m512i;

template <bool kGrouped>
ANYBIT_INLINE QqqCodes qqq_codes(const int8_t* from) {
  const __m512i spread = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm512_permutexvar_epi32(spread, _mm512_castsi128_si512(codes));
}

// The tables of int8 weights plus 128 by nibble, of one group and a block: bytes 16 j to 16 j + 15 of
// tables[i][b] are those of output channel 16 j + 8 b + i.
template <class Weights>
inline void qqq_tables(const Weights& w, int64_t group, int64_t block, int, QqqTables& tables) {
  const int64_t n0 = block * kQqqBlock;
  const Half* scales = w.scale_group + group * w.n + n0;
  alignas(64) float scale[kQqqBlock];
  for (int i = 0; i < kQqqBlock; i += kLanes)
    store_vector(scale + i, load_lanes(scales + i, lanes_below(int(w.n - n0) - i)));
  const __m512 codes = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  for (int c = 0; c < 16; ++c) {
    const auto of = [&](int j) {  // exact but for the rounding
      return _mm512_cvtps_epi32(_mm512_mul_ps(codes, _mm512_set1_ps(scale[16 * j + c])));
    };
    const __m512i bytes = bytes_from(of(0), of(1), of(2), of(3));
    const __m512i limited = _mm512_max_epi8(bytes, _mm512_set1_epi8(-127));
    tables[c % 8][c / 8] = _mm512_xor_si512(limited, _mm512_set1_epi8(char(0x80)));
  }
}

template <class Weights>
ANYBIT_INLINE void qqq_few_tables(const Weights& w, int64_t group, int64_t block,
                                  QqqFewTables& tables) {
  qqq_tables(w, group, block, 0, tables);
}

// The unsigned weights of 64 bytes of words with b = 0 and with b = 1, in the words' order of output
// and input channels. Of a group int8 weights plus 128 by tables; else codes plus 8, for b = 0
// shifted by kShift.
template <bool kGrouped>
struct QqqUnpacker {
  static constexpr int kShift = kGrouped ? 0 : 4, kAndXor = 0x6a, kAndOr = 0xea;
  const __m512i low = _mm512_set1_epi8(15), high = _mm512_set1_epi8(char(0xf0));
  const __m512i bias = _mm512_set1_epi8(8), high_bias = _mm512_set1_epi8(char(0x80));
  // bits from which the nibbles of r = 0, 1, 2, 3 begin, in the order of a group's words
  const __m512i shifts[2] = {_mm512_set1_epi64(0x3424302014041000LL),
                             _mm512_set1_epi64(0x3c2c38281c0c1808LL)};
  const __m512i channel = _mm512_set4_epi32(0x30303030, 0x20202020, 0x10101010, 0);

  ANYBIT_INLINE void operator()(const uint8_t* words, const __m512i (&tables)[2],
                                __m512i (&weights)[2]) const {
    const __m512i w = _mm512_loadu_si512(words);
    if constexpr (kGrouped) {
      for (int b = 0; b < 2; ++b) {
        const __m512i nibbles = _mm512_multishift_epi64_epi8(shifts[b], w);
        weights[b] = _mm512_permutexvar_epi8(
            _mm512_ternarylogic_epi32(nibbles, low, channel, kAndOr), tables[b]);
      }
    } else {
      weights[0] = _mm512_ternarylogic_epi32(w, high, high_bias, kAndXor);
      weights[1] = _mm512_ternarylogic_epi32(w, low, bias, kAndXor);
    }
  }
};

// The lanes of four vectors added: lane i is vector i's sum.
ANYBIT_INLINE __m512i added_lanes(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab =
      _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x44), _mm512_shuffle_i32x4(a, b, 0xee));
  const __m512i cd =
      _mm512_add_epi32(_mm512_shuffle_i32x4(c, d, 0x44), _mm512_shuffle_i32x4(c, d, 0xee));
  return _mm512_add_epi32(_mm512_shuffle_i32x4(ab, cd, 0x88), _mm512_shuffle_i32x4(ab, cd, 0xdd));
}

// kRows packed rows of one block times kTokens tokens, whose codes are [kRows][kTokens]. Those of a
// later block, `ahead` bytes away, are fetched meanwhile.
template <int kTokens, bool kGrouped, int kRows>
inline void qqq_chunk(const uint8_t* words, int64_t row_stride, int64_t ahead, const __m512i* codes,
                      const QqqTables& tables, QqqSums* sums) {
  const QqqUnpacker<kGrouped> unpack;
  __m512i totals[kTokens][2][kQqqVectors];
  for (int i = 0; i < kQqqVectors; ++i, words += 64) {
    __m512i total[kTokens][2] = {};
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      const uint8_t* from = words + row * row_stride;
      _mm_prefetch(reinterpret_cast<const char*>(from + ahead), _MM_HINT_T0);
      __m512i weights[2];
      unpack(from, tables[i], weights);
      for (int m = 0; m < kTokens; ++m) {
        total[m][0] = _mm512_dpbusd_epi32(total[m][0], weights[0], codes[row * kTokens + m]);
        total[m][1] = _mm512_dpbusd_epi32(total[m][1], weights[1], codes[row * kTokens + m]);
      }
    }
    for (int m = 0; m < kTokens; ++m) {
      // 16 times D would not always fit
      totals[m][0][i] = _mm512_srai_epi32(total[m][0], unpack.kShift);
      totals[m][1][i] = total[m][1];
    }
  }
  for (int m = 0; m < kTokens; ++m) {
    for (int part = 0; part < 2; ++part) {
      for (int b = 0; b < 2; ++b) {
        const __m512i* t = totals[m][b] + 4 * part;
        sums[m][part][b] = _mm512_add_epi32(sums[m][part][b], added_lanes(t[0], t[1], t[2], t[3]));
      }
    }
  }
}

// Sums in the order of a block's 64 output channels.
ANYBIT_INLINE void qqq_collect(const QqqSums& sums, int32_t* to) {
  const __m512i first = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
  for (int j = 0; j < 4; ++j) {
    const __m512i index = _mm512_add_epi32(first, _mm512_set1_epi32(j));
    const __m512i b0 = _mm512_permutex2var_epi32(sums[0][0], index, sums[1][0]);
    const __m512i b1 = _mm512_permutex2var_epi32(sums[0][1], index, sums[1][1]);
    _mm512_storeu_si512(to + 16 * j, _mm512_mask_blend_epi32(0xff00, b0, b1));
  }
}

// A panel of one packed row: the words of output channels 16 j + 8 b + i, j = j0 and j0 + 1, of a
// block, transposed to channels side by side.
template <bool kGrouped>
ANYBIT_INLINE void qqq_panel_row(const uint8_t* words, int j0, const QqqTables& tables,
                                 uint8_t* panel) {
  const QqqUnpacker<kGrouped> unpack;
  __m512i fours[2][2][2];  // [j - j0][b][i / 4]: lane kq, element i % 4
  for (int part = 0; part < 2; ++part) {
    __m512i w[4][2];
    for (int i = 0; i < 4; ++i) unpack(words + 64 * (4 * part + i), tables[4 * part + i], w[i]);
    for (int b = 0; b < 2; ++b) {
      const auto pair = [&](int i) {
        return j0 == 0 ? _mm512_unpacklo_epi32(w[i][b], w[i + 1][b])
                       : _mm512_unpackhi_epi32(w[i][b], w[i + 1][b]);
      };
      fours[0][b][part] = _mm512_unpacklo_epi64(pair(0), pair(2));
      fours[1][b][part] = _mm512_unpackhi_epi64(pair(0), pair(2));
    }
  }
  for (int j = 0; j < 2; ++j) {
    __m512i low[2], high[2];  // kq 0 and 1, 2 and 3 of each b
    for (int b = 0; b < 2; ++b) {
      const __m512i first =
          kGrouped || b == 1 ? fours[j][b][0] : _mm512_srli_epi32(fours[j][b][0], 4);
      const __m512i second =
          kGrouped || b == 1 ? fours[j][b][1] : _mm512_srli_epi32(fours[j][b][1], 4);
      low[b] = _mm512_shuffle_i32x4(first, second, 0x44);
      high[b] = _mm512_shuffle_i32x4(first, second, 0xee);
    }
    const __m512i steps[4] = {
        _mm512_shuffle_i32x4(low[0], low[1], 0x88), _mm512_shuffle_i32x4(low[0], low[1], 0xdd),
        _mm512_shuffle_i32x4(high[0], high[1], 0x88), _mm512_shuffle_i32x4(high[0], high[1], 0xdd)};
    for (int kq = 0; kq < 4; ++kq)
      _mm512_store_si512(panel + kStep * (kPanelRows * kq + 16 * j), steps[kq]);
  }
}

}  // namespace ANYBIT_SET
}  // namespace anybit::cpu
