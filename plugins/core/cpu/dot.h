// The inner products of a panel of unpacked weights with a few tokens, for each instruction set.
//
// A panel holds kPanelRows output channels: of every 4 input channels ("step") the codes u8
// [kPanelRows][4], so that a vector of int32 sums has one output channel in each lane.
#pragma once
#include "core/cpu/tokens.h"

namespace anybit::cpu {
namespace ANYBIT_SET {

constexpr int kPanelRows = 32;
constexpr int kStep = 4;          // input channels
constexpr int kPanelSteps = 128;  // most of a panel

using Panel = uint8_t[kPanelSteps * kPanelRows * kStep];
using Sums = int32_t[kPanelRows];
using Outputs = float[kPanelRows];

constexpr int kRunSteps = kRun / kStep;

// Four codes.
ANYBIT_INLINE int32_t codes_at(const int8_t* codes) {
  int32_t four;
  std::memcpy(&four, codes, sizeof four);
  return four;
}

// The same of token m and a step; runs of all tokens are `next_run` bytes apart.
[[maybe_unused]] ANYBIT_INLINE int32_t codes_of(const int8_t* codes, int64_t next_run, int m,
                                                int step) {
  return codes_at(codes + step / kRunSteps * next_run + kRun * m + kStep * (step % kRunSteps));
}

// What is wanted soon and fetched meanwhile, with AVX-512: every four steps the cache lines 0 to `last`,
// of up to 4, of a row, one in each step, and with it what is `second` bytes behind it. Lines are `line`
// bytes apart, rows `row`. Where nothing is wanted, a line that is near costs nothing.
struct Ahead {
  const void* at;
  int64_t row = 0, line = 0, second = 0;
  int last = 3;

#if defined(__AVX512VNNI__)
  ANYBIT_INLINE void fetch(int step) const {
    const char* from =
        static_cast<const char*>(at) + step / 4 * row + smaller(step % 4, last) * line;
    _mm_prefetch(from, _MM_HINT_T1);
    _mm_prefetch(from + second, _MM_HINT_T1);
  }
#endif
};

#if defined(__AVX512VNNI__)

constexpr int kDotTokens = 12;  // 24 accumulators

template <int kTokens>
ANYBIT_INLINE void dot_tokens(const uint8_t* panel, int steps, const int8_t* codes,
                              int64_t next_run, bool fresh, Sums* sums, const Ahead& ahead) {
  __m512i low[kTokens], high[kTokens];
  for (int m = 0; m < kTokens; ++m) {
    low[m] = fresh ? _mm512_setzero_si512() : _mm512_load_si512(sums[m]);
    high[m] = fresh ? _mm512_setzero_si512() : _mm512_load_si512(sums[m] + 16);
  }
  const auto add_step = [&](const int8_t* at) __attribute__((always_inline)) {
    const __m512i left = _mm512_load_si512(panel), right = _mm512_load_si512(panel + 64);
    panel += kPanelRows * kStep;
#pragma GCC unroll 12
    for (int m = 0; m < kTokens; ++m) {
      const __m512i four = _mm512_set1_epi32(codes_at(at + kRun * m));
      low[m] = _mm512_dpbusd_epi32(low[m], left, four);
      high[m] = _mm512_dpbusd_epi32(high[m], right, four);
    }
  };
  int run = 0;
  for (; run <= steps - kRunSteps; run += kRunSteps, codes += next_run) {
#pragma GCC unroll 8
    for (int step = 0; step < kRunSteps; ++step) {
      ahead.fetch(run + step);
      add_step(codes + kStep * step);
    }
  }
  for (int step = 0; step < steps - run; ++step) add_step(codes + kStep * step);
  for (int m = 0; m < kTokens; ++m) {
    _mm512_store_si512(sums[m], low[m]);
    _mm512_store_si512(sums[m] + 16, high[m]);
  }
}

#elif defined(__AVX2__)

constexpr int kDotTokens = 2;  // 8 accumulators

// Products of pairs in 16 bits do not saturate for codes up to `largest`, and the sums of as many
// pairs as the 16 bits hold are widened together.
template <int kTokens>
ANYBIT_INLINE void dot_narrow(const uint8_t* panel, int steps, const int8_t* codes,
                              int64_t next_run, bool fresh, Sums* sums, int largest) {
  const int together = 32767 / (2 * 128 * largest);
  const __m256i ones = _mm256_set1_epi16(1);
  for (int first = 0; first < steps; first += together) {
    __m256i pairs[kTokens][4] = {};
    const int last = smaller(first + together, steps);
    for (int step = first; step < last; ++step, panel += kPanelRows * kStep) {
#pragma GCC unroll 4
      for (int part = 0; part < 4; ++part) {
        const __m256i weights =
            _mm256_load_si256(reinterpret_cast<const __m256i*>(panel + 32 * part));
#pragma GCC unroll 2
        for (int m = 0; m < kTokens; ++m) {
          const __m256i four = _mm256_set1_epi32(codes_of(codes, next_run, m, step));
          pairs[m][part] = _mm256_add_epi16(pairs[m][part], _mm256_maddubs_epi16(weights, four));
        }
      }
    }
    for (int m = 0; m < kTokens; ++m) {
      for (int part = 0; part < 4; ++part) {
        __m256i* to = reinterpret_cast<__m256i*>(sums[m] + 8 * part);
        const __m256i wide = _mm256_madd_epi16(pairs[m][part], ones);
        const bool first_sums = fresh && first == 0;
        _mm256_store_si256(to, first_sums ? wide : _mm256_add_epi32(_mm256_load_si256(to), wide));
      }
    }
  }
}

// Codes of 8 bits: even and odd bytes apart, as 16-bit numbers.
template <int kTokens>
ANYBIT_INLINE void dot_wide(const uint8_t* panel, int steps, const int8_t* codes, int64_t next_run,
                            bool fresh, Sums* sums) {
  const __m256i even_bytes = _mm256_set1_epi16(0xff);
  __m256i totals[kTokens][4];
  for (int m = 0; m < kTokens; ++m) {
    for (int part = 0; part < 4; ++part) {
      const auto* from = reinterpret_cast<const __m256i*>(sums[m] + 8 * part);
      totals[m][part] = fresh ? _mm256_setzero_si256() : _mm256_load_si256(from);
    }
  }
  for (int step = 0; step < steps; ++step, panel += kPanelRows * kStep) {
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) {
      const __m256i weights =
          _mm256_load_si256(reinterpret_cast<const __m256i*>(panel + 32 * part));
      const __m256i even = _mm256_and_si256(weights, even_bytes);
      const __m256i odd = _mm256_srli_epi16(weights, 8);
#pragma GCC unroll 2
      for (int m = 0; m < kTokens; ++m) {
        const __m256i four = _mm256_set1_epi32(codes_of(codes, next_run, m, step));
        const __m256i even_codes = _mm256_srai_epi16(_mm256_slli_epi16(four, 8), 8);
        const __m256i odd_codes = _mm256_srai_epi16(four, 8);
        totals[m][part] =
            _mm256_add_epi32(totals[m][part], _mm256_add_epi32(_mm256_madd_epi16(even, even_codes),
                                                               _mm256_madd_epi16(odd, odd_codes)));
      }
    }
  }
  for (int m = 0; m < kTokens; ++m) {
    for (int part = 0; part < 4; ++part)
      _mm256_store_si256(reinterpret_cast<__m256i*>(sums[m] + 8 * part), totals[m][part]);
  }
}

#elif defined(__ARM_FEATURE_DOTPROD)

constexpr int kDotTokens = 3;  // 24 accumulators
constexpr int kVectors = kPanelRows * kStep / 16;

ANYBIT_INLINE int8x16_t four_codes(const int8_t* codes) {
  return vreinterpretq_s8_s32(vdupq_n_s32(codes_at(codes)));
}

// kWide: codes beyond 127, which are made signed by taking 128 away; the sums have it back at the
// beginning.
template <int kTokens, bool kWide>
ANYBIT_INLINE void dot_signed(const uint8_t* panel, int steps, const int8_t* codes,
                              int64_t next_run, bool fresh, Sums* sums) {
  int32x4_t totals[kTokens][kVectors];
  for (int m = 0; m < kTokens; ++m) {
    int32x4_t back = vdupq_n_s32(0);
    for (int step = 0; kWide && step < steps; ++step)
      back = vdotq_s32(
          back,
          four_codes(codes + step / kRunSteps * next_run + kRun * m + kStep * (step % kRunSteps)),
          vdupq_n_s8(1));
    for (int v = 0; v < kVectors; ++v) {
      const int32x4_t before = fresh ? vdupq_n_s32(0) : vld1q_s32(sums[m] + 4 * v);
      totals[m][v] = kWide ? vaddq_s32(before, vshlq_n_s32(back, 7)) : before;
    }
  }
  const auto add_step = [&](const int8_t* at) __attribute__((always_inline)) {
    int8x16_t four[kTokens];
    for (int m = 0; m < kTokens; ++m) four[m] = four_codes(at + kRun * m);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const uint8x16_t unsigned_codes = vld1q_u8(panel + 16 * v);
      const int8x16_t weights =
          vreinterpretq_s8_u8(kWide ? veorq_u8(unsigned_codes, vdupq_n_u8(128)) : unsigned_codes);
#pragma GCC unroll 3
      for (int m = 0; m < kTokens; ++m) totals[m][v] = vdotq_s32(totals[m][v], weights, four[m]);
    }
    panel += kPanelRows * kStep;
  };
  for (; steps > 0; steps -= kRunSteps, codes += next_run) {
    for (int step = 0; step < smaller(steps, kRunSteps); ++step) add_step(codes + kStep * step);
  }
  for (int m = 0; m < kTokens; ++m) {
    for (int v = 0; v < kVectors; ++v) vst1q_s32(sums[m] + 4 * v, totals[m][v]);
  }
}

#else

constexpr int kDotTokens = 1;

template <int kTokens>
inline void dot_tokens(const uint8_t* panel, int steps, const int8_t* codes, int64_t next_run,
                       bool fresh, Sums* sums, const Ahead&) {
  uint32_t totals[kPanelRows] = {};  // modulo 2^32, as the other sets add
  if (!fresh) std::memcpy(totals, sums[0], sizeof totals);
  for (int step = 0; step < steps; ++step, panel += kPanelRows * kStep) {
    const int8_t* four = codes + step / kRunSteps * next_run + kStep * (step % kRunSteps);
    for (int n = 0; n < kPanelRows; ++n) {
      const uint8_t* weights = panel + kStep * n;
      totals[n] += uint32_t(weights[0] * four[0] + weights[1] * four[1] + weights[2] * four[2] +
                            weights[3] * four[3]);
    }
  }
  std::memcpy(sums[0], totals, sizeof totals);
}

#endif

template <int kTokens>
ANYBIT_INLINE void dot_some(const uint8_t* panel, int steps, const int8_t* codes, int64_t next_run,
                            bool fresh, Sums* sums, [[maybe_unused]] int largest,
                            [[maybe_unused]] const Ahead& ahead) {
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
  if (largest > 127) return dot_wide<kTokens>(panel, steps, codes, next_run, fresh, sums);
  dot_narrow<kTokens>(panel, steps, codes, next_run, fresh, sums, largest);
#elif defined(__ARM_FEATURE_DOTPROD)
  if (largest > 127) return dot_signed<kTokens, true>(panel, steps, codes, next_run, fresh, sums);
  dot_signed<kTokens, false>(panel, steps, codes, next_run, fresh, sums);
#else
  dot_tokens<kTokens>(panel, steps, codes, next_run, fresh, sums, ahead);
#endif
}

// Calls f<count>() with the count as a constant, 1 .. kMost.
template <int kMost, class F>
ANYBIT_INLINE void with_count(int count, const F& f) {
  if constexpr (kMost > 1) {
    if (count < kMost) return with_count<kMost - 1>(count, f);
  }
  f.template operator()<kMost>();
}

// sums[m][n] = sum over k of panel[k][n] * codes[m][k], for the first `count` tokens of a tile; unless
// `fresh`, added to what is there.
//
// largest: of the panel's codes. Sums are modulo 2^32.
struct DotCall {
  const uint8_t* panel;
  int steps;
  const int8_t* codes;
  int64_t next_run;
  bool fresh;
  Sums* sums;
  int largest;
  Ahead ahead;
  template <int kTokens>
  ANYBIT_INLINE void operator()() const {
    dot_some<kTokens>(panel, steps, codes, next_run, fresh, sums, largest, ahead);
  }
};

// The same with a token of ones.
inline void dot_ones(const uint8_t* panel, int steps, bool fresh, Sums& sums, int largest) {
  int8_t ones[kRun];
  std::memset(ones, 1, sizeof ones);
  dot_some<1>(panel, steps, ones, 0, fresh, &sums, largest, {panel});
}

#if defined(ANYBIT_TILES)

// The same of kTiles tiles of 16 tokens, `next_tile` bytes apart, and as many rows of sums.
template <int kTiles>
inline void dot_tiles(const uint8_t* panel, int tile_steps, int runs, const int8_t* codes,
                      int64_t next_tile, bool fresh, Sums* sums) {
  constexpr int64_t kSumsStride = sizeof(Sums), kStepBytes = kPanelRows * kStep;
  Sums* second = sums + kTileRows;
  if (fresh) {
    tile_zero<0>(), tile_zero<1>();
    if constexpr (kTiles == 2) tile_zero<2>(), tile_zero<3>();
  } else {
    tile_load<0>(sums[0], kSumsStride), tile_load<1>(sums[0] + 16, kSumsStride);
    if constexpr (kTiles == 2)
      tile_load<2>(second[0], kSumsStride), tile_load<3>(second[0] + 16, kSumsStride);
  }
  const int64_t token_bytes = kTileRows * kStep * tile_steps;
  for (int i = 0; i < runs; ++i, panel += tile_steps * kStepBytes, codes += token_bytes) {
    tile_load<4>(codes, kStep * tile_steps);
    tile_load<6>(panel, kStepBytes);
    tile_multiply_add<0, 4, 6>();
    tile_load<7>(panel + kTileBytes, kStepBytes);
    tile_multiply_add<1, 4, 7>();
    if constexpr (kTiles == 2) {
      tile_load<5>(codes + next_tile, kStep * tile_steps);
      tile_multiply_add<2, 5, 6>();
      tile_multiply_add<3, 5, 7>();
    }
  }
  tile_store<0>(sums[0], kSumsStride), tile_store<1>(sums[0] + 16, kSumsStride);
  if constexpr (kTiles == 2)
    tile_store<2>(second[0], kSumsStride), tile_store<3>(second[0] + 16, kSumsStride);
}

// The same of tokens m0 on and of elements `position` on; m0 begins a tile, and there are sums for
// whole tiles. before(m, some) is called for `some` tokens from m0 + m on, which are next.
template <class F>
inline void dot(const uint8_t* panel, int steps, const Tokens& tokens, int64_t m0, int64_t position,
                int count, bool fresh, Sums* sums, int, const Ahead&, const F& before) {
  before(0, count);
  const TokenLayout& layout = tokens.layout;
  const int tile_steps = int(layout.run / kStep);
  const int runs = (steps + tile_steps - 1) / tile_steps;  // zeros fill up the last one's tokens
  const int8_t* codes = tokens.first_code(m0) + layout.offset(position);
  const int64_t row = layout.row_bytes;
  int m = 0;
  for (; count - m > kTileRows; m += 2 * kTileRows)
    dot_tiles<2>(panel, tile_steps, runs, codes + m * row, kTileRows * row, fresh, sums + m);
  if (m < count)
    dot_tiles<1>(panel, tile_steps, runs, codes + m * row, kTileRows * row, fresh, sums + m);
}

#else

// The same of tokens m0 on and of elements `position` on; m0 begins a tile. Something is fetched while
// the first tokens are at it, and before(m, some) is called for `some` tokens from m0 + m on, which are
// next.
template <class F>
inline void dot(const uint8_t* panel, int steps, const Tokens& tokens, int64_t m0, int64_t position,
                int count, bool fresh, Sums* sums, int largest, const Ahead& ahead,
                const F& before) {
  static_assert(kDotTokens == kTokensOfTile);
  const TokenLayout& layout = tokens.layout;
  const int8_t* codes = tokens.first_code(m0) + layout.offset(position);
  for (int m = 0; m < count; m += kDotTokens) {
    const int some = smaller(kDotTokens, count - m);
    before(m, some);
    const DotCall call{panel,    steps,   codes + m * layout.row_bytes, kDotTokens * kRun, fresh,
                       sums + m, largest, m == 0 ? ahead : Ahead{panel}};
    with_count<kDotTokens>(some, call);
  }
}

#endif

#if defined(__AVX512F__)
constexpr int kFloatTokens = 12;
#elif defined(__AVX2__) || defined(__ARM_FEATURE_DOTPROD)
constexpr int kFloatTokens = 2;
#else
constexpr int kFloatTokens = 1;
#endif

// The same with weights fp32 [k][kPanelRows] and tokens fp32, in no fixed order of rounding.
struct FloatDotCall {
  const Outputs* panel;
  int length;
  const float* tokens;
  int64_t stride;
  Outputs* sums;
  template <int kTokens>
  ANYBIT_INLINE void operator()() const {
    constexpr int kVectors = kPanelRows / kLanes;
    FloatVector totals[kTokens][kVectors];
    for (int m = 0; m < kTokens; ++m) {
      for (int v = 0; v < kVectors; ++v) totals[m][v] = load_vector(sums[m] + kLanes * v);
    }
    for (int k = 0; k < length; ++k) {
#pragma GCC unroll 12
      for (int m = 0; m < kTokens; ++m) {
        const FloatVector x = broadcast(tokens[m * stride + k]);
#pragma GCC unroll 32
        for (int v = 0; v < kVectors; ++v)
          totals[m][v] = multiply_add(x, load_vector(panel[k] + kLanes * v), totals[m][v]);
      }
    }
    for (int m = 0; m < kTokens; ++m) {
      for (int v = 0; v < kVectors; ++v) store_vector(sums[m] + kLanes * v, totals[m][v]);
    }
  }
};

inline void dot_floats(const Outputs* panel, int length, const float* tokens, int64_t stride,
                       int count, Outputs* sums) {
  for (int m = 0; m < count; m += kFloatTokens) {
    const FloatDotCall call{panel, length, tokens + m * stride, stride, sums + m};
    with_count<kFloatTokens>(smaller(kFloatTokens, count - m), call);
  }
}

}  // namespace ANYBIT_SET
}  // namespace anybit::cpu
