// ABQGemm for a few tokens with AVX-512: bit planes are read once, straight from memory, and turned
// into codes in registers by transposing 8 x 8 bits.
//
// 64 bytes of each plane hold 512 codes. Fields of codes (planes_avx512.h) are not shifted down: a
// field's sum is 4^f or 16^f times as large and is shifted once, at the end. Lane L has codes 128 L to
// 128 L + 127, the first 64 in vectors 0 to 3 and the others in 4 to 7.
#pragma once
#include "abq_gemm/cpu/few_avx2.h"
#include "abq_gemm/cpu/planes_avx512.h"

namespace anybit::cpu {
namespace ANYBIT_SET {

constexpr int kAbqSpan = 512;  // codes of 64 bytes of each plane
constexpr int kAbqRowsTogether = 16;
constexpr int kAbqAhead = 8192;  // bytes of all planes, fetched before they are wanted
constexpr int kAbqMostTotals =
    32;  // vectors of a row, before the next row: memory is read in order

// A token's codes in the order in which the planes' codes come out.
inline void abq_order(const int8_t* codes, int64_t bytes, int planes, int8_t* ordered) {
  const int fields = planes <= 2 ? 4 : planes <= 4 ? 2 : 1;
  for (int64_t span = 0; span < bytes; span += kAbqSpan) {
    for (int v = 0; v < kAbqVectors; ++v) {
      for (int half_lane = 0; half_lane < 8; ++half_lane) {
        const int lane = half_lane / 2, byte = abq_byte_of(fields, v, half_lane % 2);
        std::memcpy(ordered + span + 64 * v + 8 * half_lane, codes + span + 128 * lane + 8 * byte,
                    8);
      }
    }
  }
}

// The elements of each lane of 16 vectors added: vector L has lane L's sums.
ANYBIT_INLINE void abq_lane_sums(const __m512i* rows, __m512i* lanes) {
  __m512i fours[4];  // of rows 4 q to 4 q + 3, side by side in each lane
  for (int q = 0; q < 4; ++q) {
    const __m512i* t = rows + 4 * q;
    const __m512i left =
        _mm512_add_epi32(_mm512_unpacklo_epi32(t[0], t[1]), _mm512_unpackhi_epi32(t[0], t[1]));
    const __m512i right =
        _mm512_add_epi32(_mm512_unpacklo_epi32(t[2], t[3]), _mm512_unpackhi_epi32(t[2], t[3]));
    fours[q] =
        _mm512_add_epi32(_mm512_unpacklo_epi64(left, right), _mm512_unpackhi_epi64(left, right));
  }
  const __m512i low[2] = {_mm512_shuffle_i32x4(fours[0], fours[1], 0x44),
                          _mm512_shuffle_i32x4(fours[2], fours[3], 0x44)};
  const __m512i high[2] = {_mm512_shuffle_i32x4(fours[0], fours[1], 0xee),
                           _mm512_shuffle_i32x4(fours[2], fours[3], 0xee)};
  lanes[0] = _mm512_shuffle_i32x4(low[0], low[1], 0x88);
  lanes[1] = _mm512_shuffle_i32x4(low[0], low[1], 0xdd);
  lanes[2] = _mm512_shuffle_i32x4(high[0], high[1], 0x88);
  lanes[3] = _mm512_shuffle_i32x4(high[0], high[1], 0xdd);
}

// 64 bytes, or what is left of a row; rows are multiples of 16 bytes.
ANYBIT_INLINE __m512i abq_span(const uint8_t* from, int64_t left) {
  if (left >= 64) return _mm512_loadu_si512(from);
  return _mm512_maskz_loadu_epi32(__mmask16((1 << left / 4) - 1), from);
}

// Sums of products of 16 rows of weights from n on with every operand; the sums of group g and
// operand i go to sums[g * kOperands + i][column ...].
//
// kSets: 2 where groups are halves of a lane, else 1.
// kChains: sums of each field side by side, so that products need not wait for each other where they
// are of a whole row.
// kExact: there are kPlanes planes, and rows are whole spans: nothing is asked in the inner loop.
template <int kPlanes, int kOperands, int kSets, int kChains, bool kExact>
inline void abq_rows(const AbqRows& w, int64_t n, Sums* sums, int column) {
  constexpr int kFields = 8 / kPlanes, kTotals = kFields * kChains, kOfSpan = kOperands * kSets;
  constexpr int kSpans = kOfSpan < kAbqMostTotals ? kAbqMostTotals / kOfSpan : 1;
  __m512i totals[kSpans][kOperands][kSets][kAbqRowsTogether];
  const bool whole_row = kExact ? kChains == 2 : w.n_groups == 1;
  int64_t group = 0, position = 0;  // of the next sums, position in the group
  const auto flush = [&](int span) {
    __m512i lanes[kOperands][kSets][4];
    for (int i = 0; i < kOperands; ++i) {
      for (int set = 0; set < kSets; ++set) abq_lane_sums(totals[span][i][set], lanes[i][set]);
    }
    for (int lane = 0; lane < 4 && group < w.n_groups; ++lane) {
      for (int set = 0; set < kSets && group < w.n_groups; ++set) {
        for (int i = 0; i < kOperands; ++i) {
          int32_t* to = sums[group * kOperands + i] + column;
          _mm512_store_si512(to, _mm512_add_epi32(_mm512_load_si512(to), lanes[i][set][lane]));
        }
        position += whole_row ? 0 : 128 / kSets;
        if (position < w.group_bytes) continue;
        position = 0;
        ++group;
      }
    }
  };
  const auto row_span = [&](const uint8_t* row, int64_t first, int64_t ahead,
                            __m512i(&fields)[kOperands][kSets][kTotals]) {
    const int64_t left = w.row_bytes - first;
    __m512i plane[kPlanes], codes[kAbqVectors];
    for (int j = 0; j < kPlanes; ++j)
      if (kExact || j < w.planes)
        _mm_prefetch(reinterpret_cast<const char*>(row) + first + ahead + j * w.plane_bytes,
                     _MM_HINT_T0);
    for (int j = 0; j < kPlanes; ++j)
      plane[j] = kExact         ? _mm512_loadu_si512(row + first + j * w.plane_bytes)
                 : j < w.planes ? abq_span(row + first + j * w.plane_bytes, left)
                                : _mm512_setzero_si512();
    abq_codes<kPlanes>(plane, codes);
    for (int i = 0; i < kOperands; ++i) {
      const int8_t* operand = w.operands + i * w.operand_bytes + 8 * first;
      for (int v = 0; v < kAbqVectors; ++v) {
        __m512i& field = fields[i][kSets == 2 ? v / 4 : 0][v % kTotals];
        field = _mm512_dpbusd_epi32(field, codes[v], _mm512_loadu_si512(operand + 64 * v));
      }
    }
  };
  const auto close = [&](int span, int r, const __m512i(&fields)[kOperands][kSets][kTotals]) {
    for (int i = 0; i < kOperands; ++i) {
      for (int set = 0; set < kSets; ++set) {
        __m512i total = _mm512_setzero_si512();
        for (int f = 0; f < kFields; ++f) {
          __m512i field = fields[i][set][f];
          for (int chain = 1; chain < kChains; ++chain)
            field = _mm512_add_epi32(field, fields[i][set][f + kFields * chain]);
          total = f == 0 ? field : _mm512_add_epi32(total, _mm512_srai_epi32(field, kPlanes * f));
        }
        totals[span][i][set][r] = total;
      }
    }
  };
  const int64_t together = whole_row ? w.row_bytes : smaller<int64_t>(64 * kSpans, w.row_bytes);
  const int64_t rows_ahead = (kAbqAhead / kPlanes + together - 1) / together;
  for (int64_t first = 0; first < w.row_bytes; first += together) {
    const int64_t last = smaller(first + together, w.row_bytes);
    int spans = 0;
    for (int r = 0; r < kAbqRowsTogether; ++r) {
      const int64_t channel = smaller(n + r, w.n - 1);
      const uint8_t* row = w.words + channel * w.row_bytes;
      for (int64_t group = 0; first == 0 && group < w.n_groups; group += 16) {
        const int64_t term = channel * w.n_groups + group;
        _mm_prefetch(reinterpret_cast<const char*>(w.scale + term), _MM_HINT_T0);
        _mm_prefetch(w.offsets + 4 * term, _MM_HINT_T0);
      }
      // behind the last of these rows come their next bytes, if there are any
      const bool turns = r + rows_ahead >= kAbqRowsTogether && last < w.row_bytes;
      const int64_t ahead =
          rows_ahead * w.row_bytes + (turns ? together - kAbqRowsTogether * w.row_bytes : 0);
      spans = 0;
      for (int64_t at = first; at < last; ++spans) {
        __m512i fields[kOperands][kSets][kTotals] = {};
        do {
          row_span(row, at, ahead, fields);
          at += 64;
        } while (whole_row && at < last);
        close(spans, r, fields);
      }
    }
    for (int span = 0; span < spans; ++span) flush(span);
  }
}

template <int kPlanes, int kOperands, bool kExact>
ANYBIT_INLINE void abq_rows_of_groups(const AbqRows& w, int64_t n, Sums* sums, int column) {
  if (w.n_groups > 1 && w.group_bytes == 64)
    return abq_rows<kPlanes, kOperands, 2, 1, kExact>(w, n, sums, column);
  if constexpr (kOperands == 1) {
    if (w.n_groups == 1) return abq_rows<kPlanes, kOperands, 1, 2, kExact>(w, n, sums, column);
  }
  abq_rows<kPlanes, kOperands, 1, 1, kExact>(w, n, sums, column);
}

template <int kPlanes, int kOperands>
ANYBIT_INLINE void abq_rows_of_planes(const AbqRows& w, int64_t n, Sums* sums, int column) {
  // Up to a tenth faster with eight planes, and with two in groups; not with four, nor with two of
  // whole rows.
  constexpr bool kPays = kOperands == 1 && kPlanes != 4;
  if constexpr (kPays) {
    const bool exact = w.planes == kPlanes && w.row_bytes % 64 == 0;
    if (exact && (kPlanes == 8 || w.n_groups > 1))
      return abq_rows_of_groups<kPlanes, kOperands, true>(w, n, sums, column);
  }
  abq_rows_of_groups<kPlanes, kOperands, false>(w, n, sums, column);
}

template <int kOperands>
inline void abq_lane_rows(const AbqRows& w, int64_t n, int columns, Sums* sums) {
  for (int column = 0; column < columns; column += kAbqRowsTogether) {
    if (w.planes <= 2) {
      abq_rows_of_planes<2, kOperands>(w, n + column, sums, column);
    } else if (w.planes <= 4) {
      abq_rows_of_planes<4, kOperands>(w, n + column, sums, column);
    } else {
      abq_rows_of_planes<8, kOperands>(w, n + column, sums, column);
    }
  }
}

// Whether the groups are whole lanes or halves of them.
ANYBIT_INLINE bool abq_in_lanes(const TokenLayout& layout) {
  return layout.n_groups == 1 || layout.group_bytes % 128 == 0 || layout.group_bytes == 64;
}

// A token's codes as abq_few_rows() wants them.
inline void abq_few_order(const TokenLayout& layout, const int8_t* codes, int planes,
                          int8_t* ordered) {
  if (abq_in_lanes(layout))
    return abq_order(codes, layout.row_bytes / kAbqSpan * kAbqSpan, planes, ordered);
  std::memcpy(ordered, codes, size_t(layout.row_bytes));
}

// Sums of up to 32 rows from n on.
template <int kOperands>
ANYBIT_INLINE void abq_few_rows(const AbqRows& w, const TokenLayout& layout, int64_t n, int columns,
                                Sums* sums) {
  if (abq_in_lanes(layout)) return abq_lane_rows<kOperands>(w, n, columns, sums);
  for (int column = 0; column < columns; ++column)
    abq_word_row<kOperands>(w, n + column, column, sums);
}

// to[g][0 .. 16): 32-bit numbers of group g, g = 0 .. 3, and 16 rows.
ANYBIT_INLINE void abq_four_columns(const void* const* rows, __m512i* to) {
  __m512i t[4];  // lane L: four numbers of row 4 L + r
  for (int r = 0; r < 4; ++r) {
    const auto row = [&](int lane) {
      return _mm_loadu_si128(static_cast<const __m128i*>(rows[4 * lane + r]));
    };
    t[r] = _mm512_inserti32x4(
        _mm512_inserti32x4(_mm512_inserti32x4(_mm512_castsi128_si512(row(0)), row(1), 1), row(2),
                           2),
        row(3), 3);
  }
  const __m512i left[2] = {_mm512_unpacklo_epi32(t[0], t[1]), _mm512_unpackhi_epi32(t[0], t[1])};
  const __m512i right[2] = {_mm512_unpacklo_epi32(t[2], t[3]), _mm512_unpackhi_epi32(t[2], t[3])};
  for (int half = 0; half < 2; ++half) {
    to[2 * half] = _mm512_unpacklo_epi64(left[half], right[half]);
    to[2 * half + 1] = _mm512_unpackhi_epi64(left[half], right[half]);
  }
}

// abq_terms() of 4 groups.
inline void abq_terms_of_four(const AbqWeights& w, int64_t n_groups, int64_t group, int64_t n0,
                              AbqGroupTerms* terms) {
  __m512i largest = _mm512_setzero_si512();
  for (int first = 0; first < kPanelRows; first += 16) {
    const void *scales[16], *offsets[16];
    for (int r = 0; r < 16; ++r) {
      const int64_t at = smaller(n0 + first + r, w.n - 1) * n_groups + group;
      scales[r] = w.scale + at;
      offsets[r] = w.offsets() + 4 * at;
    }
    __m512i scale[kAbqGroupsTogether], offset[kAbqGroupsTogether];
    abq_four_columns(scales, scale);
    abq_four_columns(offsets, offset);
    for (int g = 0; g < kAbqGroupsTogether; ++g) {
      _mm512_store_si512(terms[g].scale + first, scale[g]);
      if (w.minimum) _mm512_store_si512(terms[g].minimum + first, offset[g]);
      const __m512i zero = w.minimum ? _mm512_setzero_si512() : offset[g];
      _mm512_store_si512(terms[g].zero + first, zero);
      largest = _mm512_max_epu32(largest, _mm512_abs_epi32(zero));
    }
  }
  for (int g = 0; g < kAbqGroupsTogether; ++g)
    terms[g].largest_zero = _mm512_reduce_max_epu32(largest);  // of all: enough, if not the least
}

}  // namespace ANYBIT_SET
}  // namespace anybit::cpu
