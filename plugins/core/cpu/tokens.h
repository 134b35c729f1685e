// One token's way from X to what the kernels multiply: RMSNorm, then codes; the same numbers as
// plugins/core/activation.py.
#pragma once
#include <cmath>

#include "core/cpu/floats.h"
#if defined(ANYBIT_TILES)
#include "core/cpu/tiles.h"
#endif

namespace anybit::cpu {
namespace ANYBIT_SET {

// Tokens of a tile, whose codes lie together: what a kernel multiplies with a panel at a time.
#if defined(ANYBIT_TILES)
constexpr int kTokensOfTile = kTileRows;
#elif defined(__AVX512VNNI__)
constexpr int kTokensOfTile = 12;
#elif defined(__AVX2__)
constexpr int kTokensOfTile = 2;
#elif defined(__ARM_FEATURE_DOTPROD)
constexpr int kTokensOfTile = 3;
#else
constexpr int kTokensOfTile = 1;
#endif
constexpr int kRun = 32;  // codes of a token side by side in a tile, but for AMX

// Where the elements of a token lie: every group begins at a multiple of `group_bytes`, and what is
// between groups and behind the last is 0.
//
// Tokens lie in tiles, [row_bytes / run][tile_tokens][run]: a panel meets them in the order of memory.
// In rows each would be in a page of its own. Kernels for few tokens want rows, tiles of one token.
struct TokenLayout {
  int64_t k, n_groups, group_len;
  int64_t group_bytes;
  int64_t row_bytes;  // an odd number of cache lines, so that rows do not share cache sets
  int64_t tile_tokens, run;

  // Where element `position` of the padded row is behind the token's first.
  ANYBIT_INLINE int64_t offset(int64_t position) const {
    const int64_t in_run = position & (run - 1);
    return (position - in_run) * tile_tokens + in_run;
  }
};

ANYBIT_INLINE TokenLayout token_layout(int64_t k, int64_t n_groups, int64_t alignment) {
  TokenLayout layout;
  layout.k = k, layout.n_groups = n_groups, layout.group_len = k / n_groups;
  layout.group_bytes = (layout.group_len + alignment - 1) / alignment * alignment;
  const int64_t lines = (n_groups * layout.group_bytes + 511) / 512 * 8;
  layout.row_bytes = (lines | 1) * 64;
  layout.tile_tokens = kTokensOfTile, layout.run = kRun;
#if defined(ANYBIT_TILES)
  // a tile that is not full costs as much time
  if (n_groups == 1 || layout.group_bytes % kTileBytes == 0) layout.run = kTileBytes;
#endif
  return layout;
}

constexpr int kElements = 64;    // of a token, in registers or on the stack, at a time
constexpr int64_t kKept = 8192;  // most elements of a token whose norm is kept on the stack

// The tokens of one slab, in the workspace.
struct Tokens {
  TokenLayout layout;
  int8_t* codes;  // [m / tile_tokens, tile_tokens * row_bytes]
  float* scale;   // [m]
  int32_t* zero;  // [m]
  int32_t* sums;  // [m, n_groups] of the codes

  ANYBIT_INLINE int8_t* first_code(int64_t m) const {
    const int64_t in_tile = m % layout.tile_tokens;
    return codes + (m - in_tile) * layout.row_bytes + in_tile * layout.run;
  }

  // Kernels that want rows read beyond the end.
  ANYBIT_INLINE void clear(int64_t m) const {
    if (layout.tile_tokens == 1) std::memset(first_code(m), 0, size_t(layout.row_bytes));
  }

  // Codes `first` on of a group of token m: `count` of them, and zeros up to kElements.
  ANYBIT_INLINE void put(int64_t m, int64_t group, int64_t first, int count,
                         const int8_t* from) const {
    int8_t* token = first_code(m);
    const int64_t position = group * layout.group_bytes + first;
    for (int part = 0; part < count; part += kRun)
      std::memcpy(token + layout.offset(position + part), from + part, kRun);
    // what fills up the last tile
    if (layout.run > kRun && count <= kRun)
      std::memcpy(token + layout.offset(position + kRun), from + kRun, kRun);
  }
};

// A token after its norm, or as it is without one.
template <class T>
struct NormedToken {
  const T* x;      // [k]
  const T* gamma;  // [k], or null
  double inverse_rms;

  ANYBIT_INLINE NormedToken(const T* token, const T* weights, int64_t k, double epsilon)
      : x(token), gamma(weights), inverse_rms(1) {
    if (gamma == nullptr) return;
    alignas(64) double squares[8] = {};  // in this order whatever the instruction set
#if defined(__AVX512F__)
    __m512d total = _mm512_setzero_pd();
    for (int64_t first = 0; first < k; first += kLanes) {
      const int count = int(smaller<int64_t>(kLanes, k - first));
      const FloatVector v = load_lanes(x + first, lanes_below(count));
      for (int part = 0; part < 2; ++part)
        total = _mm512_add_pd(total, _mm512_mul_pd(doubles(v, part), doubles(v, part)));
    }
    _mm512_store_pd(squares, total);
#else
    alignas(64) float v[kElements];
    for (int64_t first = 0; first < k; first += kElements) {
      const int count = int(smaller<int64_t>(kElements, k - first));
      for (int i = count; i < kElements; ++i) v[i] = 0;
      load_floats(x + first, count, v);
      for (int i = 0; i < kElements; i += 8) {
        for (int j = 0; j < 8; ++j) squares[j] += double(v[i + j]) * double(v[i + j]);
      }
    }
#endif
    for (int j = 1; j < 8; ++j) squares[0] += squares[j];
    inverse_rms = 1 / std::sqrt(squares[0] / double(k) + epsilon);
  }

  // to[0 .. kElements): elements first, first + 1 ..., and 0 from `count` on.
  ANYBIT_INLINE void read(int64_t first, int count, float* to) const {
#if defined(__AVX512F__)
    for (int i = 0; i < kElements; i += kLanes) {
      const __mmask16 mask = lanes_below(count - i);
      FloatVector v = load_lanes(x + first + i, mask);
      if (gamma != nullptr) {
        const FloatVector weights = load_lanes(gamma + first + i, mask);
        const auto half = [&](int part) {
          const __m512d scaled = _mm512_mul_pd(doubles(v, part), _mm512_set1_pd(inverse_rms));
          return _mm512_cvtpd_ps(_mm512_mul_pd(scaled, doubles(weights, part)));
        };
        v = round_vector<T>(_mm512_insertf32x8(_mm512_castps256_ps512(half(0)), half(1), 1));
      }
      store_vector(to + i, v);
    }
#else
    for (int i = count; i < kElements; ++i) to[i] = 0;
    load_floats(x + first, count, to);
    if (gamma == nullptr) return;
    alignas(64) float weights[kElements] = {};
    load_floats(gamma + first, count, weights);
    for (int i = 0; i < kElements; ++i)
      to[i] = float(double(to[i]) * inverse_rms * double(weights[i]));
    round_floats<T>(to, kElements);
#endif
  }
};

// Floor of a row's range, as TINY of activation.py.
constexpr float kTiny = 0x1p-118f;

// x ~ scale * (code - zero); each fp32 operation is rounded on its own. A row with a NaN or an
// infinity has a NaN scale and codes 0.
struct TokenQuant {
  float scale, inverse, zero, lo, hi;
  bool finite;
};

// kept: takes the elements after the norm, and zeros behind them to a whole kElements; or null.
template <class T>
ANYBIT_INLINE TokenQuant token_quant(const NormedToken<T>& x, int64_t k, int bits, bool symmetric,
                                     float* kept = nullptr) {
  alignas(64) float one[kElements], low[kLanes], high[kLanes], bad[kLanes];
  FloatVector lows = broadcast(0), highs = lows, bads = lows;
  for (int64_t first = 0; first < k; first += kElements) {
    float* v = kept ? kept + first : one;
    x.read(first, int(smaller<int64_t>(kElements, k - first)), v);
    for (int i = 0; i < kElements; i += kLanes) {
      const FloatVector each = load_vector(v + i);
      lows = lesser(each, lows);
      highs = greater(each, highs);
      bads = sum_of(bads, difference(each, each));  // NaN from a NaN or an infinity on
    }
  }
  store_vector(low, lows);
  store_vector(high, highs);
  store_vector(bad, bads);
  for (int j = 1; j < kLanes; ++j) {
    low[0] = low[j] < low[0] ? low[j] : low[0];
    high[0] = high[j] > high[0] ? high[j] : high[0];
    bad[0] += bad[j];
  }
  TokenQuant q;
  q.hi = float((1 << (bits - 1)) - 1);
  q.lo = symmetric ? -q.hi : -q.hi - 1;
  const float range = symmetric ? (-low[0] > high[0] ? -low[0] : high[0]) : high[0] - low[0];
  const float steps = symmetric ? q.hi : float((1 << bits) - 1);
  q.scale = (range > kTiny ? range : kTiny) / steps + (range - range) + bad[0];
  q.inverse = 1.0f / q.scale;
  q.finite = q.scale == q.scale;
  q.zero = 0;
  if (!symmetric && q.finite) {
    const float zero = rounded(-low[0] * q.inverse) + q.lo;
    q.zero = zero < q.lo ? q.lo : zero > q.hi ? q.hi : zero;
  }
  return q;
}

// Codes of `count` of kElements elements, and zeros behind them; what they add up to is added to
// `sums`, in parts.
#if defined(__AVX512VNNI__)
using CodeSums = __m512i;

ANYBIT_INLINE void codes_from(const float* v, int count, const TokenQuant& q, int8_t* codes,
                              CodeSums& sums) {
  const __m512 point = _mm512_set1_ps(kNoFraction);
  __m512i parts[4];
  for (int i = 0; i < 4; ++i) {
    const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(v + 16 * i), _mm512_set1_ps(q.inverse));
    const __m512 whole = _mm512_sub_ps(_mm512_add_ps(scaled, point), point);
    const __m512 code = _mm512_add_ps(whole, _mm512_set1_ps(q.zero));
    parts[i] = _mm512_maskz_cvtps_epi32(
        lanes_below(count - 16 * i),
        _mm512_min_ps(_mm512_max_ps(code, _mm512_set1_ps(q.lo)), _mm512_set1_ps(q.hi)));
  }
  const __m512i ordered = bytes_from(parts[0], parts[1], parts[2], parts[3]);
  _mm512_store_si512(codes, ordered);
  sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), ordered);
}

ANYBIT_INLINE int32_t sum_of_parts(const CodeSums& sums) { return _mm512_reduce_add_epi32(sums); }
#else
using CodeSums = int32_t;

ANYBIT_INLINE void codes_from(const float* v, int count, const TokenQuant& q, int8_t* codes,
                              CodeSums& sums) {
  for (int i = 0; i < kElements; ++i) {
    const float code = rounded(v[i] * q.inverse) + q.zero;
    codes[i] = int8_t(int32_t(code < q.lo ? q.lo : code > q.hi ? q.hi : code));
  }
  for (int i = count; i < kElements; ++i) codes[i] = 0;
  for (int i = 0; i < kElements; ++i) sums += codes[i];
}

ANYBIT_INLINE int32_t sum_of_parts(CodeSums sums) { return sums; }
#endif

// Codes of one token, its scale, zero point and sums.
template <class T>
ANYBIT_INLINE void quantize_token(const NormedToken<T>& x, int bits, bool symmetric,
                                  const Tokens& tokens, int64_t m) {
  const TokenLayout& layout = tokens.layout;
  // a norm costs more than its result in the cache; without one X is read twice
  alignas(64) float all[kKept + kElements], some[kElements];
  float* kept = x.gamma != nullptr && layout.k <= kKept ? all : nullptr;
  const TokenQuant q = token_quant(x, layout.k, bits, symmetric, kept);
  // a group's last elements are read together with what is behind them
  if (kept) std::memset(kept + (layout.k + kElements - 1) / kElements * kElements, 0, sizeof some);
  tokens.scale[m] = q.scale;
  tokens.zero[m] = int32_t(q.zero);
  tokens.clear(m);
  alignas(64) int8_t codes[kElements];
  for (int64_t group = 0; group < layout.n_groups; ++group) {
    CodeSums sums = {};
    for (int64_t first = 0; first < layout.group_len; first += kElements) {
      const int count = int(smaller<int64_t>(kElements, layout.group_len - first));
      const int64_t element = group * layout.group_len + first;
      const float* v = kept ? kept + element : some;
      if (q.finite) {
        if (!kept) x.read(element, count, some);
        codes_from(v, count, q, codes, sums);
      } else {
        std::memset(codes, 0, sizeof codes);
      }
      tokens.put(m, group, first, count, codes);
    }
    tokens.sums[m * layout.n_groups + group] = sum_of_parts(sums);
  }
}

// 2^exponent for exponents of normal numbers.
ANYBIT_INLINE float power_of_two(int exponent) {
  return float_of_bits(uint32_t(exponent + 127) << 23);
}

// A token that is not quantized, as whole numbers of 2^e, from the largest element on 22 bits or, with
// four digits, 30: these are `digits` codes to the base 256 each, the highest first, and so many tokens
// from m on. Scales are NaN where that is no way to write the token: of a NaN or an infinity, and where
// nearly all elements are so far below the largest that little is left of them. The weights of that
// one may be 0, and the others make the sum.
template <class T>
ANYBIT_INLINE void split_token(const NormedToken<T>& x, int digits, const Tokens& tokens,
                               int64_t m) {
  constexpr int kNumbers = 16;
  const TokenLayout& layout = tokens.layout;
  alignas(64) float all[kKept + kElements], some[kElements];
  float* kept = layout.k <= kKept ? all : nullptr;
  alignas(64) uint32_t most[kNumbers] = {};  // bits of magnitudes are in the order of the numbers
  for (int64_t first = 0; first < layout.k; first += kElements) {
    float* v = kept ? kept + first : some;
    x.read(first, int(smaller<int64_t>(kElements, layout.k - first)), v);
    for (int i = 0; i < kElements; i += kNumbers) {
      for (int j = 0; j < kNumbers; ++j) {
        const uint32_t magnitude = bits_of(v[i + j]) & 0x7fffffff;
        most[j] = magnitude > most[j] ? magnitude : most[j];
      }
    }
  }
  if (kept) std::memset(kept + (layout.k + kElements - 1) / kElements * kElements, 0, sizeof some);
  for (int j = 1; j < kNumbers; ++j) most[0] = most[j] > most[0] ? most[j] : most[0];
  const bool finite = most[0] < 0x7f800000;
  // down to the last bit of the smallest number; a power beyond those of fp32 is made of two
  int e = int(most[0] >> 23) - 127 - (digits == 4 ? 29 : 21);
  e = e < -149 ? -149 : e;
  const float down = power_of_two(-e / 2), rest = power_of_two(-e - -e / 2);
  for (int d = 0; d < digits; ++d) {
    tokens.zero[m + d] = 0;
    tokens.clear(m + d);
  }
  // One in 16 elements with so many units, and the halves of units that all lose are together some
  // 2^-11 of the sum, the last bit of fp16, or 2^-17.
  const int32_t enough = digits == 4 ? 1 << 17 : 1 << 11;
  int32_t with_enough = 0, not_zero = 0;
  alignas(64) int8_t codes[4][kElements];
  for (int64_t group = 0; group < layout.n_groups; ++group) {
    int32_t sums[4] = {};
    for (int64_t first = 0; first < layout.group_len; first += kElements) {
      const int count = int(smaller<int64_t>(kElements, layout.group_len - first));
      const int64_t element = group * layout.group_len + first;
      const float* v = kept ? kept + element : some;
      if (!kept) x.read(element, count, some);
      alignas(64) int32_t whole[kElements];
      if (finite) {
        for (int i = 0; i < kElements; ++i) whole[i] = whole_from(v[i] * down * rest);
      }
      for (int i = finite ? count : 0; i < kElements; ++i) whole[i] = 0;
      for (int i = 0; i < count; ++i) {
        with_enough += (whole[i] < 0 ? -whole[i] : whole[i]) >= enough;
        not_zero += v[i] != 0;
      }
      for (int d = digits - 1; d >= 0; --d) {
        for (int i = 0; i < kElements; ++i) {
          const int32_t digit = int32_t(uint32_t(whole[i]) << 24) >> 24;
          codes[d][i] = int8_t(digit);
          whole[i] = (whole[i] - digit) >> 8;
          sums[d] += digit;
        }
        tokens.put(m + d, group, first, count, codes[d]);
      }
    }
    for (int d = 0; d < digits; ++d) tokens.sums[(m + d) * layout.n_groups + group] = sums[d];
  }
  const bool written = finite && int64_t{16} * with_enough >= not_zero;
  for (int d = 0; d < digits; ++d) {
    const int power = e + 8 * (digits - 1 - d);
    const float scale = power_of_two(power / 2) * power_of_two(power - power / 2);
    tokens.scale[m + d] = written ? scale : float_of_bits(0x7fc00000);
  }
}

}  // namespace ANYBIT_SET
}  // namespace anybit::cpu
