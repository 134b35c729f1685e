// Codes from bit planes with AVX-512, by transposing 8 x 8 bits.
//
// Bytes of the planes are interleaved, so that 8 bytes hold all bits of 8 bit columns, and one GF(2)
// matrix product (gf2p8affineqb) turns every such square. With 2 or 4 planes a byte then has 4 or 2
// codes side by side ("fields"). Nothing crosses a lane of 128 bits.
#pragma once
#include "abq_gemm/cpu/weights.h"

namespace anybit::cpu {
namespace ANYBIT_SET {

constexpr int kAbqVectors = 8;  // of codes, in 64 bytes of each plane

// Vector v has field f = v % fields of the interleaved pair t = v / fields; its qword q of a lane holds
// the codes of this byte of that lane of a plane.
ANYBIT_INLINE int abq_byte_of(int fields, int v, int q) {
  return (2 * (v / fields) + q) * fields + fields - 1 - v % fields;
}

// Codes of 64 bytes of each plane, times 4^f or 16^f. kPlanes is 2, 4 or 8; planes that there are not
// are 0.
template <int kPlanes>
ANYBIT_INLINE void abq_codes(const __m512i* plane, __m512i* codes) {
  const __m512i transpose = _mm512_set1_epi64(0x8040201008040201LL);
  const auto turned = [&](__m512i squares) {
    return _mm512_gf2p8affine_epi64_epi8(transpose, squares, 0);
  };
  if constexpr (kPlanes == 2) {
    const __m512i c[2] = {turned(_mm512_unpacklo_epi8(plane[1], plane[0])),
                          turned(_mm512_unpackhi_epi8(plane[1], plane[0]))};
    for (int t = 0; t < 2; ++t) {
      for (int f = 0; f < 4; ++f)
        codes[4 * t + f] = _mm512_and_si512(c[t], _mm512_set1_epi8(char(3 << 2 * f)));
    }
  } else if constexpr (kPlanes == 4) {
    const __m512i high[2] = {_mm512_unpacklo_epi8(plane[3], plane[2]),
                             _mm512_unpackhi_epi8(plane[3], plane[2])};
    const __m512i low[2] = {_mm512_unpacklo_epi8(plane[1], plane[0]),
                            _mm512_unpackhi_epi8(plane[1], plane[0])};
    for (int t = 0; t < 4; ++t) {
      const __m512i c = turned(t % 2 ? _mm512_unpackhi_epi16(high[t / 2], low[t / 2])
                                     : _mm512_unpacklo_epi16(high[t / 2], low[t / 2]));
      codes[2 * t] = _mm512_and_si512(c, _mm512_set1_epi8(15));
      codes[2 * t + 1] = _mm512_and_si512(c, _mm512_set1_epi8(char(0xf0)));
    }
  } else {
    __m512i pairs[2][4];
    for (int i = 0; i < 4; ++i) {
      pairs[0][i] = _mm512_unpacklo_epi8(plane[7 - 2 * i], plane[6 - 2 * i]);
      pairs[1][i] = _mm512_unpackhi_epi8(plane[7 - 2 * i], plane[6 - 2 * i]);
    }
    for (int i = 0; i < 4; ++i) {
      const __m512i* pair = pairs[i / 2];
      const __m512i high =
          i % 2 ? _mm512_unpackhi_epi16(pair[0], pair[1]) : _mm512_unpacklo_epi16(pair[0], pair[1]);
      const __m512i low =
          i % 2 ? _mm512_unpackhi_epi16(pair[2], pair[3]) : _mm512_unpacklo_epi16(pair[2], pair[3]);
      codes[2 * i] = turned(_mm512_unpacklo_epi32(high, low));
      codes[2 * i + 1] = turned(_mm512_unpackhi_epi32(high, low));
    }
  }
}

// 16 output channels of a panel, 4 * steps elements from word `word` of a row on: lane L of the planes
// takes channel 4 L + r, 16 bytes at a time.
template <int kPlanes>
inline void abq_unpack_planes(const AbqWeights& w, int64_t n0, int64_t word, int steps,
                              uint8_t* panel) {
  constexpr int kFields = 8 / kPlanes, kStepsTogether = 32;
  const int64_t plane_bytes = 4 * w.n * w.row_words;
  const uint8_t* rows[16];
  for (int i = 0; i < 16; ++i) rows[i] = w.row(0, smaller(n0 + i, w.n - 1)) + 4 * word;
  for (int first = 0; first < steps; first += kStepsTogether) {
    const int count = smaller(kStepsTogether, steps - first);
    const __mmask8 words = __mmask8((1 << count / 8) - 1);
    __m512i codes[4][kAbqVectors];
    for (int r = 0; r < 4; ++r) {
      __m512i plane[kPlanes];
      for (int j = 0; j < kPlanes; ++j) {
        if (j >= w.planes) {
          plane[j] = _mm512_setzero_si512();
          continue;
        }
        const auto lane = [&](int i) {
          const uint8_t* from = rows[4 * i + r] + j * plane_bytes + first / 2;
          return count == kStepsTogether ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(from))
                                         : _mm_maskz_loadu_epi32(words, from);
        };
        const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(lane(0)), lane(1), 1);
        const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(lane(2)), lane(3), 1);
        plane[j] = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
      }
      abq_codes<kPlanes>(plane, codes[r]);
    }
#pragma GCC unroll 8
    for (int v = 0; v < kAbqVectors; ++v) {
      __m512i four[4];
      for (int r = 0; r < 4; ++r)  // masked, so that nothing is shifted into a neighbour
        four[r] = _mm512_srli_epi16(codes[r][v], unsigned(kPlanes * (v % kFields)));
      const __m512i low[2] = {_mm512_unpacklo_epi32(four[0], four[1]),
                              _mm512_unpacklo_epi32(four[2], four[3])};
      const __m512i high[2] = {_mm512_unpackhi_epi32(four[0], four[1]),
                               _mm512_unpackhi_epi32(four[2], four[3])};
      const __m512i of_step[4] = {
          _mm512_unpacklo_epi64(low[0], low[1]), _mm512_unpackhi_epi64(low[0], low[1]),
          _mm512_unpacklo_epi64(high[0], high[1]), _mm512_unpackhi_epi64(high[0], high[1])};
      for (int d = 0; d < 4; ++d) {
        const int step = 2 * abq_byte_of(kFields, v, d / 2) + d % 2;
        if (step < count)
          _mm512_store_si512(panel + (first + step) * kPanelRows * kStep, of_step[d]);
      }
    }
  }
}

}  // namespace ANYBIT_SET
}  // namespace anybit::cpu
