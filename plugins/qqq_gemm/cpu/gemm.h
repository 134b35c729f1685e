// QQQGemm on a CPU: nibbles become int8 weights plus an offset, which makes them unsigned. Compiled
// once for each instruction set.
#pragma once
#include "qqq_gemm/cpu/layout.h"
#if defined(__AVX512VNNI__)
#include "qqq_gemm/cpu/few_avx512.h"
#endif
#if (defined(__AVX512VNNI__) && !defined(ANYBIT_TILES)) || defined(__ARM_FEATURE_DOTPROD)
#define ANYBIT_QQQ_FEW
#endif

namespace anybit::cpu {
namespace ANYBIT_SET {

// What makes weights unsigned: a nibble per channel is code + 8 after one xor, and of a group's int8
// weights it is 128. Sets whose products are signed leave them as they are.
#if defined(__ARM_FEATURE_DOTPROD)
constexpr int kQqqOffset = 0, kQqqGroupedOffset = 0;
#else
constexpr int kQqqOffset = 8, kQqqGroupedOffset = 128;
#endif

struct QqqWeights {
  int64_t n, blocks, group_size;
  const uint8_t* words;     // uint32 [k / 16, blocks, 8, 4, 4]
  const Half* scale_group;  // [k / group_size, n], or null
  const float* scale;       // [n]

  // Words of block `block` in packed row `row`.
  ANYBIT_INLINE const uint8_t* at(int64_t row, int64_t block) const {
    return words + (row * blocks + block) * kQqqBlockBytes;
  }
};

#if defined(__AVX2__) && !defined(__AVX512VNNI__)
// Scales of the output channels of a panel, of one group.
using QqqTables = float[kPanelRows];

inline void qqq_tables(const QqqWeights& w, int64_t group, int64_t block, int j0,
                       QqqTables& scales) {
  const int64_t n0 = block * kQqqBlock + 16 * j0;
  const int columns = int(smaller<int64_t>(kPanelRows, w.n - n0));
  std::memset(scales, 0, sizeof scales);
  load_floats(w.scale_group + group * w.n + n0, columns, scales);
}

// A panel of one packed row: 4 steps. Words of output channels n and n + 8, 4 input channels.
template <bool kGrouped>
inline void qqq_panel_row(const uint8_t* words, int j0, const QqqTables& scales, uint8_t* panel) {
  const __m256i nibble = _mm256_set1_epi32(15), nibbles = _mm256_set1_epi8(15);
  __m256i channels[4][2];  // [kq][j - j0]: words of i = 0 .. 7
  for (int half = 0; half < 2; ++half) {
    const auto pair = [&](int i) {  // lane kq: i and i + 1 of j0, then of j0 + 1
      const auto* from = reinterpret_cast<const __m256i*>(words + 64 * i + 32 * half);
      const __m256i even = _mm256_loadu_si256(from), odd = _mm256_loadu_si256(from + 2);
      return j0 == 0 ? _mm256_unpacklo_epi32(even, odd) : _mm256_unpackhi_epi32(even, odd);
    };
    const __m256i pairs[4] = {pair(0), pair(2), pair(4), pair(6)};
    for (int j = 0; j < 2; ++j) {
      const auto four = [&](int i) {
        return j == 0 ? _mm256_unpacklo_epi64(pairs[i / 2], pairs[i / 2 + 1])
                      : _mm256_unpackhi_epi64(pairs[i / 2], pairs[i / 2 + 1]);
      };
      channels[2 * half][j] = _mm256_permute2x128_si256(four(0), four(4), 0x20);
      channels[2 * half + 1][j] = _mm256_permute2x128_si256(four(0), four(4), 0x31);
    }
  }
  for (int kq = 0; kq < 4; ++kq, panel += kPanelRows * kStep) {
    for (int j = 0; j < 2; ++j) {
      const __m256i word = channels[kq][j];
      for (int b = 0; b < 2; ++b) {
        const int channel = 16 * j + 8 * b;
        __m256i four;
        if constexpr (kGrouped) {
          const __m256 scale = _mm256_loadu_ps(scales + channel);
          const auto weight = [&](int shift) {  // int8 plus 128; the product is exact
            const __m256i code =
                _mm256_sub_epi32(_mm256_and_si256(_mm256_srli_epi32(word, shift + 8 * b), nibble),
                                 _mm256_set1_epi32(8));
            const __m256i whole =
                _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_cvtepi32_ps(code), scale));
            const __m256i limited = _mm256_max_epi32(
                _mm256_min_epi32(whole, _mm256_set1_epi32(127)), _mm256_set1_epi32(-127));
            return _mm256_add_epi32(limited, _mm256_set1_epi32(kQqqGroupedOffset));
          };
          // r = 0, 2, 1, 3 begin at bits 0, 4, 16, 20
          four = _mm256_or_si256(
              _mm256_or_si256(weight(0), _mm256_slli_epi32(weight(16), 8)),
              _mm256_or_si256(_mm256_slli_epi32(weight(4), 16), _mm256_slli_epi32(weight(20), 24)));
        } else {
          const __m256i biased = _mm256_xor_si256(word, _mm256_set1_epi8(char(0x88)));
          four = _mm256_and_si256(b == 0 ? _mm256_srli_epi32(biased, 4) : biased, nibbles);
        }
        _mm256_store_si256(reinterpret_cast<__m256i*>(panel + kStep * channel), four);
      }
    }
  }
}
#elif !defined(__AVX512VNNI__)
// Four nibbles in bytes of their own with the offset.
ANYBIT_INLINE uint32_t qqq_bytes(uint32_t nibbles) {
  if (kQqqOffset) return nibbles ^ 0x08080808;
  return nibbles | (nibbles & 0x08080808) * 0x1e;  // the sign in all upper bits
}

// Int8 weights with the offset by nibble, of one scale.
ANYBIT_INLINE void qqq_table(float scale, uint8_t* table) {
#if defined(__ARM_FEATURE_DOTPROD)
  int16x8_t halves[2];
  for (int half = 0; half < 2; ++half) {
    const int32x4_t codes = {-8, -7, -6, -5};
    const auto whole = [&](int first) {  // exact but for the rounding
      const int32x4_t four = vaddq_s32(codes, vdupq_n_s32(8 * half + first));
      return vqmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(vcvtq_f32_s32(four), scale)));
    };
    halves[half] = vcombine_s16(whole(0), whole(4));
  }
  const int8x16_t bytes = vcombine_s8(vqmovn_s16(halves[0]), vqmovn_s16(halves[1]));
  vst1q_u8(table, vreinterpretq_u8_s8(vmaxq_s8(bytes, vdupq_n_s8(-127))));
#else
  for (int nibble = 0; nibble < 16; ++nibble) {
    float v = float(nibble - 8) * scale;  // exact: 4 bits times 11
    v = v > 127.0f ? 127.0f : v < -127.0f ? -127.0f : v;
    table[nibble] = uint8_t(int(rounded(v)) + kQqqGroupedOffset);
  }
#endif
}

// The same of one group and the output channels of a panel.
using QqqTables = uint8_t[kPanelRows][16];

inline void qqq_tables(const QqqWeights& w, int64_t group, int64_t block, int j0,
                       QqqTables& table) {
  const int64_t n0 = block * kQqqBlock + 16 * j0;
  for (int i = 0; i < kPanelRows; ++i) {
    const float scale = n0 + i < w.n ? float_from(w.scale_group[group * w.n + n0 + i]) : 0.0f;
    qqq_table(scale, table[i]);
  }
}

// A panel of one packed row: 4 steps. Words of output channels n and n + 8, 4 input channels.
template <bool kGrouped>
inline void qqq_panel_row(const uint8_t* words, int j0, const QqqTables& tables, uint8_t* panel) {
  for (int lane = 0; lane < 32; ++lane) {
    uint8_t* step = panel + lane % 4 * kPanelRows * kStep;
    for (int j = 0; j < 2; ++j) {
      uint32_t word;
      std::memcpy(&word, words + 16 * lane + 4 * (j0 + j), sizeof word);
      const int i = 16 * j + lane / 4;  // output channel of the panel with b = 0
      uint8_t *low = step + kStep * i, *high = low + kStep * 8;
      if constexpr (!kGrouped) {
        const uint32_t b0 = qqq_bytes(word >> 4 & 0x0f0f0f0f), b1 = qqq_bytes(word & 0x0f0f0f0f);
        std::memcpy(low, &b0, sizeof b0);
        std::memcpy(high, &b1, sizeof b1);
      } else {
        const uint8_t *of_low = tables[i], *of_high = tables[i + 8];
        for (int r = 0; r < 4; ++r) {
          const int nibble = r / 2 + r % 2 * 4;  // nibbles with b = 0: r 0, 2, -, -, 1, 3
          low[r] = of_low[word >> 4 * nibble & 15];
          high[r] = of_high[word >> (4 * nibble + 8) & 15];
        }
      }
    }
  }
}
#endif

}  // namespace ANYBIT_SET
}  // namespace anybit::cpu

#if defined(ANYBIT_QQQ_FEW)
#include "qqq_gemm/cpu/few.h"
#endif

namespace anybit::cpu {
namespace ANYBIT_SET {

struct QqqKernel {
  TokenLayout layout;
  int largest;
  bool needs_code_sums = false;
  int64_t weight_bytes;
  QqqWeights weights;

  ANYBIT_INLINE QqqKernel(const GemmShape& s, const GemmBuffers& b) {
    layout = qqq_layout(s);
    weights.n = s.n, weights.group_size = s.group_size;
    weights.blocks = (s.n + kQqqBlock - 1) / kQqqBlock;
    weights.words = reinterpret_cast<const uint8_t*>(b.weight);
    weights.scale_group = static_cast<const Half*>(b.scale_group);
    weights.scale = b.scale;
    weight_bytes = layout.group_bytes / kQqqRow * weights.blocks * kQqqBlockBytes;
    largest = s.group_size ? 127 + kQqqGroupedOffset : 15;
  }

  ANYBIT_INLINE void unpack(int64_t n0, int64_t position, int steps, uint8_t* panel) const {
    const int64_t block = n0 / kQqqBlock;
    const int j0 = int(n0 % kQqqBlock) / 16;
    int64_t group = -1;
    QqqTables tables;
    for (int row = 0; row < steps / 4; ++row, panel += 4 * kPanelRows * kStep) {
      const int64_t at = position / kQqqRow + row;
      if (weights.group_size == 0) {
        qqq_panel_row<false>(weights.at(at, block), j0, tables, panel);
        continue;
      }
      if (at * kQqqRow / weights.group_size != group) {
        group = at * kQqqRow / weights.group_size;
        qqq_tables(weights, group, block, j0, tables);
      }
      qqq_panel_row<true>(weights.at(at, block), j0, tables, panel);
    }
  }

  // Half of the block behind, while either half of this one is multiplied: as many lines as steps.
  ANYBIT_INLINE Ahead ahead(int64_t n0, int64_t position, const uint8_t* panel) const {
    const int64_t block = n0 / kQqqBlock, half = n0 % kQqqBlock / kPanelRows;
    if (block + 1 >= weights.blocks) return {panel};
    return {weights.at(position / kQqqRow, block + 1) + half * (kQqqBlockBytes / 2),
            weights.blocks * kQqqBlockBytes, 64};
  }

  // Scales of a panel's output channels.
  struct Terms {
    alignas(64) float scale[kPanelRows];
  };
  ANYBIT_INLINE void read_terms(int64_t, int64_t n0, Terms& terms) const {
    std::memset(terms.scale, 0, sizeof terms.scale);
    const int64_t columns = smaller<int64_t>(kPanelRows, weights.n - n0);
    std::memcpy(terms.scale, weights.scale + n0, sizeof(float) * size_t(columns));
  }

  // outputs = float(D) * scale.
  ANYBIT_INLINE void add_group(const Terms& terms, int64_t, const Tokens& tokens, int64_t m0,
                               int count, const Sums* sums, const Sums&, Outputs* outputs) const {
    const int32_t offset = weights.group_size ? kQqqGroupedOffset : kQqqOffset;
    for (int m = 0; m < count; ++m) {
      // modulo 2^32: with the offset the sums may leave the range, D does not
      const uint32_t bias = uint32_t(offset) * uint32_t(tokens.sums[m0 + m]);
      for (int i = 0; i < kPanelRows; ++i)
        outputs[m][i] = float(int32_t(uint32_t(sums[m][i]) - bias)) * terms.scale[i];
    }
  }

  static constexpr int kMoreRows = 0;
#if defined(ANYBIT_QQQ_FEW)
  static constexpr int kFewTokens = kQqqFewTokens;
  ANYBIT_INLINE bool takes_few(int64_t) const { return true; }
  template <class T>
  ANYBIT_INLINE void few(const SlabMemory& slab, int m, const Destination<T>& to,
                         const Parallel& parallel) const {
    qqq_few(*this, slab, m, to, parallel);
  }
#else
  static constexpr int kFewTokens = 0;
#endif
};

inline void qqq_gemm(const GemmShape& s, const GemmBuffers& b, const Parallel& parallel) {
  const QqqKernel kernel(s, b);
  with_dtype(s.dtype, [&](auto t) { integer_gemm<decltype(t)>(kernel, s, b, parallel); });
}

}  // namespace ANYBIT_SET
}  // namespace anybit::cpu
