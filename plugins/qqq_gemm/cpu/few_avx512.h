// QQQGemm for a few tokens with AVX-512: words are read once, straight from memory, in the order in
// which they lie.
//
// 64 bytes are the words of output channels i, i + 8, i + 16 ... of a block of 64 and of 16 input
// channels: lane kq has input channels 4 kq to 4 kq + 3, element j of it output channels 16 j + i
// (b = 0) and 16 j + i + 8 (b = 1). A token's 16 codes are therefore spread to 4 equal elements a
// lane, and the lanes of the sums are added at the end.
//
// Two or four rows of many blocks are walked before the next: of one block all the way down, every
// 512 bytes would be in another page.
#pragma once
#include "qqq_gemm/cpu/layout.h"

namespace anybit::cpu {
namespace ANYBIT_SET {

constexpr int kQqqVectors = 8;  // of a block's packed row
constexpr int qqq_rows_together(int tokens) { return tokens == 1 ? 2 : 4; }
constexpr int kQqqMostBlocks = 32;  // whose sums, 1 KB for each token, stay in the cache
constexpr int kQqqAhead = 2 * kQqqBlockBytes;

// Sums of a block and a token by vector i and b.
using QqqSums = __m512i[kQqqVectors][2];
using QqqTables = __m512i[kQqqVectors][2];

// The tables of int8 weights plus 128 by nibble, of one group and a block: bytes 16 j to 16 j + 15 of
// tables[i][b] are those of output channel 16 j + 8 b + i.
template <class Weights>
ANYBIT_INLINE void qqq_tables(const Weights& w, int64_t group, int64_t block, QqqTables& tables) {
  const int64_t n0 = block * kQqqBlock;
  const __m512 codes = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  const __m512i least = _mm512_set1_epi32(-127);
  for (int j = 0; j < 4; ++j) {
    const int64_t left = w.n - n0 - 16 * j;
    const __mmask16 mask =
        left >= 16 ? __mmask16(0xffff) : __mmask16(left > 0 ? (1 << left) - 1 : 0);
    alignas(64) float scale[16];
    _mm512_store_ps(scale, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(
                               mask, w.scale_group + group * w.n + n0 + 16 * j)));
    for (int c = 0; c < 16; ++c) {
      const __m512 exact = _mm512_mul_ps(codes, _mm512_set1_ps(scale[c]));
      const __m512i whole = _mm512_max_epi32(_mm512_cvtps_epi32(exact), least);
      _mm_store_si128(reinterpret_cast<__m128i*>(&tables[c % 8][c / 8]) + j,
                      _mm512_cvtsepi32_epi8(whole));  // at most 127
    }
  }
  for (int i = 0; i < kQqqVectors; ++i) {
    for (int b = 0; b < 2; ++b)
      tables[i][b] = _mm512_xor_si512(tables[i][b], _mm512_set1_epi8(char(0x80)));
  }
}

// `rows` packed rows from row0 on, of one block, times kTokens tokens.
template <int kTokens, bool kGrouped>
inline void qqq_chunk(const uint8_t* words, int64_t row_stride, int rows,
                      const __m512i (*codes)[kTokens], const __m512i (&tables)[kQqqVectors][2],
                      QqqSums* sums) {
  const __m512i low = _mm512_set1_epi8(15), high = _mm512_set1_epi8(char(0xf0));
  const __m512i bias = _mm512_set1_epi8(8), high_bias = _mm512_set1_epi8(char(0x80));
  // bits from which the nibbles of r = 0, 1, 2, 3 begin, in the order of a group's words
  const __m512i shifts[2] = {_mm512_set1_epi64(0x3424302014041000LL),
                             _mm512_set1_epi64(0x3c2c38281c0c1808LL)};
  const __m512i channel = _mm512_set4_epi32(0x30303030, 0x20202020, 0x10101010, 0);
  constexpr int kAndXor = 0x6a, kAndOr = 0xea;
  const auto weights_of = [&](__m512i w, int i, __m512i(&weights)[2]) {
    if constexpr (kGrouped) {
      for (int b = 0; b < 2; ++b) {
        const __m512i nibbles = _mm512_multishift_epi64_epi8(shifts[b], w);
        weights[b] = _mm512_permutexvar_epi8(
            _mm512_ternarylogic_epi32(nibbles, low, channel, kAndOr), tables[i][b]);
      }
    } else {  // code + 8, 16 times for b = 0
      weights[0] = _mm512_ternarylogic_epi32(w, high, high_bias, kAndXor);
      weights[1] = _mm512_ternarylogic_epi32(w, low, bias, kAndXor);
    }
  };
  if constexpr (kTokens == 1) {  // all sums in registers, and memory is read 512 bytes at a time
    __m512i total[kQqqVectors][2];
    std::memcpy(total, sums[0], sizeof total);
    for (int row = 0; row < rows; ++row, words += row_stride) {
#pragma GCC unroll 8
      for (int i = 0; i < kQqqVectors; ++i) {
        _mm_prefetch(reinterpret_cast<const char*>(words + 64 * i + kQqqAhead), _MM_HINT_T0);
        __m512i weights[2];
        weights_of(_mm512_loadu_si512(words + 64 * i), i, weights);
        total[i][0] = _mm512_dpbusd_epi32(total[i][0], weights[0], codes[row][0]);
        total[i][1] = _mm512_dpbusd_epi32(total[i][1], weights[1], codes[row][0]);
      }
    }
    std::memcpy(sums[0], total, sizeof total);
    return;
  }
  for (int i = 0; i < kQqqVectors; ++i, words += 64) {
    __m512i total[kTokens][2];
    for (int m = 0; m < kTokens; ++m) {
      total[m][0] = sums[m][i][0];
      total[m][1] = sums[m][i][1];
    }
    const uint8_t* from = words;
    for (int row = 0; row < rows; ++row, from += row_stride) {
      const __m512i w = _mm512_loadu_si512(from);
      // The same row of a later block: the processor sees no stream in 512 bytes here and there.
      _mm_prefetch(reinterpret_cast<const char*>(from + kQqqAhead), _MM_HINT_T0);
      __m512i weights[2];
      weights_of(w, i, weights);
      for (int m = 0; m < kTokens; ++m) {
        total[m][0] = _mm512_dpbusd_epi32(total[m][0], weights[0], codes[row][m]);
        total[m][1] = _mm512_dpbusd_epi32(total[m][1], weights[1], codes[row][m]);
      }
    }
    for (int m = 0; m < kTokens; ++m) {
      sums[m][i][0] = total[m][0];
      sums[m][i][1] = total[m][1];
    }
  }
}

// The lanes of four vectors added: lane i is vector i's sum.
ANYBIT_INLINE __m512i added_lanes(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab =
      _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x44), _mm512_shuffle_i32x4(a, b, 0xee));
  const __m512i cd =
      _mm512_add_epi32(_mm512_shuffle_i32x4(c, d, 0x44), _mm512_shuffle_i32x4(c, d, 0xee));
  return _mm512_add_epi32(_mm512_shuffle_i32x4(ab, cd, 0x88), _mm512_shuffle_i32x4(ab, cd, 0xdd));
}

// Sums of a block in the order of its 64 output channels.
ANYBIT_INLINE void qqq_collect(const QqqSums& sums, bool grouped, int32_t* to) {
  __m512i added[2][2];  // [i / 4][b]: lane i % 4, element j
  // Per channel b = 0 counts 16 times; all four lanes of that would not always fit.
  const auto sum = [&](int i, int b) {
    return b == 0 && !grouped ? _mm512_srai_epi32(sums[i][b], 4) : sums[i][b];
  };
  for (int part = 0; part < 2; ++part) {
    for (int b = 0; b < 2; ++b)
      added[part][b] = added_lanes(sum(4 * part, b), sum(4 * part + 1, b), sum(4 * part + 2, b),
                                   sum(4 * part + 3, b));
  }
  const __m512i first = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
  for (int j = 0; j < 4; ++j) {
    const __m512i index = _mm512_add_epi32(first, _mm512_set1_epi32(j));
    const __m512i b0 = _mm512_permutex2var_epi32(added[0][0], index, added[1][0]);
    const __m512i b1 = _mm512_permutex2var_epi32(added[0][1], index, added[1][1]);
    _mm512_storeu_si512(to + 16 * j, _mm512_mask_blend_epi32(0xff00, b0, b1));
  }
}

template <class Kernel, class T>
struct QqqFewCall {
  const Kernel& kernel;
  const Tokens& tokens;
  const Destination<T>& to;
  int64_t first_block, last_block;

  template <int kTokens>
  ANYBIT_INLINE void operator()() const {
    if (kernel.weights.group_size) return blocks<kTokens, true>();
    blocks<kTokens, false>();
  }

  template <int kTokens, bool kGrouped>
  inline void blocks() const {
    constexpr int kBlocks = kQqqMostBlocks / kTokens;
    for (int64_t block = first_block; block < last_block; block += kBlocks)
      column<kTokens, kGrouped, kBlocks>(block, int(smaller<int64_t>(kBlocks, last_block - block)));
  }

  // All packed rows of up to kBlocks blocks.
  template <int kTokens, bool kGrouped, int kBlocks>
  ANYBIT_INLINE void column(int64_t block0, int count) const {
    const auto& w = kernel.weights;
    const int64_t rows = tokens.layout.group_bytes / kQqqRow;
    // as many rows as share tables, and of those as many as are walked together
    const int64_t rows_of_table = kGrouped ? w.group_size / kQqqRow : rows;
    constexpr int kTogether = qqq_rows_together(kTokens);
    const int64_t row_stride = w.blocks * kQqqBlockBytes;
    const __m512i spread = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    alignas(64) QqqSums sums[kQqqMostBlocks];
    std::memset(sums, 0, sizeof(QqqSums) * size_t(count * kTokens));
    alignas(64) QqqTables tables[kGrouped ? kBlocks : 1];
    for (int64_t row0 = 0, end; row0 < rows; row0 = end) {
      end = row0 + smaller<int64_t>(kTogether, rows_of_table - row0 % rows_of_table);
      __m512i codes[kTogether][kTokens];
      for (int64_t row = row0; row < end; ++row) {
        for (int m = 0; m < kTokens; ++m) {
          const int8_t* from = tokens.codes + m * tokens.layout.row_bytes + kQqqRow * row;
          codes[row - row0][m] = _mm512_permutexvar_epi32(
              spread,
              _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
        }
      }
      for (int block = 0; block < count; ++block) {
        QqqTables& of_block = tables[kGrouped ? block : 0];
        if (kGrouped && row0 % rows_of_table == 0)
          qqq_tables(w, row0 / rows_of_table, block0 + block, of_block);
        qqq_chunk<kTokens, kGrouped>(w.at(row0, block0 + block), row_stride, int(end - row0), codes,
                                     of_block, sums + block * kTokens);
      }
    }
    for (int block = 0; block < count; ++block) {
      alignas(64) Sums halves[kTokens][2];
      alignas(64) Outputs outputs;
      for (int m = 0; m < kTokens; ++m) {
        qqq_collect(sums[block * kTokens + m], kGrouped, halves[m][0]);
        for (int half = 0; half < 2; ++half) {
          const int64_t n0 = (block0 + block) * kQqqBlock + half * kPanelRows;
          if (n0 >= w.n) break;
          kernel.add_group(0, n0, tokens, m, 1, &halves[m][half], halves[m][half], &outputs);
          to.write(&outputs, m, 1, n0);
        }
      }
    }
  }
};

template <class Kernel, class T>
inline void qqq_few(const Kernel& kernel, const SlabMemory& slab, int m, const Destination<T>& to,
                    const Parallel& parallel) {
  const int64_t blocks = kernel.weights.blocks;
  const Shares shares = shares_of(blocks, kernel.weight_bytes, 1);
  parallel(size_t(shares.count), [&](size_t task) {
    const int64_t first = int64_t(task) * shares.blocks_per_task;
    const int64_t last = smaller(first + shares.blocks_per_task, blocks);
    with_count<kQqqFewTokens>(m, QqqFewCall<Kernel, T>{kernel, slab.tokens, to, first, last});
  });
}

}  // namespace ANYBIT_SET
}  // namespace anybit::cpu
