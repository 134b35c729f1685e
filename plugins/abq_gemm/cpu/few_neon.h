// ABQGemm for a few tokens with NEON's dot product: bit planes are read once, straight from memory, and
// their bits sorted to codes in registers.
//
// 16 bytes of each plane hold 128 codes. Bit t of byte i is that of code 8 i + t, so that the vector of
// t has every eighth code, and 32-bit lane L of its products those of word L: groups are whole words.
#pragma once
#include "abq_gemm/cpu/weights.h"

namespace anybit::cpu {
namespace ANYBIT_SET {

constexpr int kAbqSpan = 128;  // codes of 16 bytes of each plane
constexpr int kAbqVectors = 8;
constexpr int kAbqWords = kAbqSpan / kAbqWord;

// A token's codes as abq_few_rows() wants them.
inline void abq_few_order(const TokenLayout& layout, const int8_t* codes, int, int8_t* ordered) {
  for (int64_t span = 0; span + kAbqSpan <= layout.row_bytes; span += kAbqSpan) {
    for (int t = 0; t < kAbqVectors; ++t) {
      for (int i = 0; i < 16; ++i) ordered[span + 16 * t + i] = codes[span + 8 * i + t];
    }
  }
}

// Every other field of kBits bits of a, those of b behind them; and what is left of both.
template <int kBits>
ANYBIT_INLINE void abq_sorted(uint8x16_t a, uint8x16_t b, uint8x16_t& even, uint8x16_t& odd) {
  const uint8x16_t of_a = vdupq_n_u8(kBits == 1 ? 0x55 : 0x33);
  even = vbslq_u8(of_a, a, vshlq_n_u8(b, kBits));
  odd = vbslq_u8(of_a, vshrq_n_u8(a, kBits), b);
}

// nibbles[t], t = 0 .. 3: of four planes, code t and code t + 4 of each byte.
ANYBIT_INLINE void abq_nibbles(const uint8x16_t* plane, uint8x16_t* nibbles) {
  uint8x16_t low[2], high[2];
  abq_sorted<1>(plane[0], plane[1], low[0], low[1]);
  abq_sorted<1>(plane[2], plane[3], high[0], high[1]);
  for (int t = 0; t < 2; ++t) abq_sorted<2>(low[t], high[t], nibbles[t], nibbles[t + 2]);
}

// Codes of 16 bytes of each plane. kPlanes is 2, 4 or 8; planes that there are not are 0.
template <int kPlanes>
ANYBIT_INLINE void abq_codes(const uint8x16_t* plane, uint8x16_t* codes) {
  if constexpr (kPlanes == 2) {
    uint8x16_t pairs[2];
    abq_sorted<1>(plane[0], plane[1], pairs[0], pairs[1]);
    const uint8x16_t mask = vdupq_n_u8(3);
    for (int t = 0; t < 2; ++t) {
      codes[t] = vandq_u8(pairs[t], mask);
      codes[t + 2] = vandq_u8(vshrq_n_u8(pairs[t], 2), mask);
      codes[t + 4] = vandq_u8(vshrq_n_u8(pairs[t], 4), mask);
      codes[t + 6] = vshrq_n_u8(pairs[t], 6);
    }
  } else {
    uint8x16_t low[4], high[4];
    abq_nibbles(plane, low);
    if constexpr (kPlanes == 8) abq_nibbles(plane + 4, high);
    for (int t = 0; t < 4; ++t) {
      if constexpr (kPlanes == 8) {
        codes[t] = vsliq_n_u8(low[t], high[t], 4);
        codes[t + 4] = vsriq_n_u8(high[t], low[t], 4);
      } else {
        codes[t] = vandq_u8(low[t], vdupq_n_u8(15));
        codes[t + 4] = vshrq_n_u8(low[t], 4);
      }
    }
  }
}

// Products of a row of weights with every operand: put(group, operand, sum). codes_at(first, codes)
// gives the weights of 16 bytes of each plane.
template <int kOperands, class Codes, class Put>
ANYBIT_INLINE void abq_row(const AbqRows& w, const Codes& codes_at, const Put& put) {
  const int64_t group_words = w.group_bytes / kAbqWord, n_words = group_words * w.n_groups;
  const bool in_vectors = w.n_groups == 1 || group_words % kAbqWords == 0;
  int32x4_t totals[kOperands][2] = {};
  int64_t group = 0, word = 0;  // in the group
  for (int64_t first = 0; first < w.row_bytes; first += 16) {
    uint8x16_t codes[kAbqVectors];
    codes_at(first, codes);
    for (int i = 0; i < kOperands; ++i) {
      const int8_t* operand = w.operands + i * w.operand_bytes + 8 * first;
      for (int t = 0; t < kAbqVectors; ++t)
        totals[i][t % 2] =
            vdotq_s32(totals[i][t % 2], vreinterpretq_s8_u8(codes[t]), vld1q_s8(operand + 16 * t));
    }
    word += kAbqWords;
    const bool last = first + 16 == w.row_bytes;
    if (in_vectors && (w.n_groups == 1 ? !last : word < group_words)) continue;
    const int64_t before = word - kAbqWords;
    for (int i = 0; i < kOperands; ++i) {
      const int32x4_t words = vaddq_s32(totals[i][0], totals[i][1]);
      totals[i][0] = totals[i][1] = vdupq_n_s32(0);
      if (in_vectors) {
        put(group, i, vaddvq_s32(words));
        continue;
      }
      int32_t each[kAbqWords];
      vst1q_s32(each, words);
      for (int lane = 0; lane < kAbqWords && before + lane < n_words; ++lane)
        put((before + lane) / group_words, i, each[lane]);
    }
    if (in_vectors) ++group, word = 0;
  }
}

template <int kPlanes, int kOperands>
inline void abq_rows(const AbqRows& w, int64_t n, int columns, Sums* sums) {
  // sdot is signed: of eight planes 128 is taken away by the last, and given back here
  const bool wide = w.planes == 8;
  if (wide) {
    const auto ones = [](int64_t, uint8x16_t* codes) {
      for (int t = 0; t < kAbqVectors; ++t) codes[t] = vdupq_n_u8(1);
    };
    abq_row<kOperands>(w, ones, [&](int64_t group, int i, int32_t sum) {
      for (int column = 0; column < columns; ++column)
        sums[group * kOperands + i][column] += sum * 128;
    });
  }
  for (int column = 0; column < columns; ++column) {
    const uint8_t* row = w.words + (n + column) * w.row_bytes;
    const auto of_row = [&](int64_t first, uint8x16_t* codes) __attribute__((always_inline)) {
      uint8x16_t plane[kPlanes];
      for (int j = 0; j < kPlanes; ++j)
        plane[j] = j < w.planes ? vld1q_u8(row + first + j * w.plane_bytes) : vdupq_n_u8(0);
      if (kPlanes == 8 && wide) plane[7] = vmvnq_u8(plane[7]);
      abq_codes<kPlanes>(plane, codes);
    };
    abq_row<kOperands>(w, of_row, [&](int64_t group, int i, int32_t sum) {
      sums[group * kOperands + i][column] += sum;
    });
  }
}

// Sums of up to 32 rows from n on.
template <int kOperands>
ANYBIT_INLINE void abq_few_rows(const AbqRows& w, const TokenLayout&, int64_t n, int columns,
                                Sums* sums) {
  if (w.planes <= 2) return abq_rows<2, kOperands>(w, n, columns, sums);
  if (w.planes <= 4) return abq_rows<4, kOperands>(w, n, columns, sums);
  abq_rows<8, kOperands>(w, n, columns, sums);
}

}  // namespace ANYBIT_SET
}  // namespace anybit::cpu
