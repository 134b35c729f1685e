// ABQGemm on a CPU: codes from bit planes, inner products, zero points, scales. Compiled once for
// each instruction set.
#pragma once
#include "abq_gemm/cpu/weights.h"
#if defined(__AVX512VNNI__)
#include "abq_gemm/cpu/planes_avx512.h"
#endif
#if (defined(__AVX2__) && !defined(ANYBIT_TILES)) || defined(__ARM_FEATURE_DOTPROD)
#define ANYBIT_ABQ_FEW
#include "abq_gemm/cpu/few.h"
#endif

namespace anybit::cpu {
namespace ANYBIT_SET {

// A panel of 4 * steps elements from word `word` of a row on; channels beyond the last repeat it.
#if defined(__AVX512VNNI__)
inline void abq_unpack(const AbqWeights& w, int64_t n0, int64_t word, int steps, uint8_t* panel) {
  for (int half = 0; half < 2; ++half, n0 += 16, panel += 64) {
    if (w.planes <= 2) {
      abq_unpack_planes<2>(w, n0, word, steps, panel);
    } else if (w.planes <= 4) {
      abq_unpack_planes<4>(w, n0, word, steps, panel);
    } else {
      abq_unpack_planes<8>(w, n0, word, steps, panel);
    }
  }
}
#else
inline void abq_unpack(const AbqWeights& w, int64_t n0, int64_t word, int steps, uint8_t* panel) {
  constexpr int kNibbles = kAbqWord / kStep;
  const uint8_t* rows[kPanelRows];
  for (int i = 0; i < kPanelRows; ++i) rows[i] = w.row(0, smaller(n0 + i, w.n - 1)) + 4 * word;
  const int64_t plane_bytes = 4 * w.n * w.row_words;
  for (int first = 0; first < steps; first += kNibbles, panel += kNibbles * kPanelRows * kStep) {
    alignas(64) uint32_t plane_words[8][kPanelRows];
    for (int plane = 0; plane < w.planes; ++plane) {
      for (int i = 0; i < kPanelRows; ++i)
        std::memcpy(&plane_words[plane][i], rows[i] + plane * plane_bytes + first / 2, 4);
    }
    for (int nibble = 0; nibble < kNibbles; ++nibble) {
      alignas(64) uint32_t codes[kPanelRows] = {};
      for (int plane = 0; plane < w.planes; ++plane) {
        // the product has bit b of the nibble at bit 8 b
        for (int i = 0; i < kPanelRows; ++i)
          codes[i] |= ((plane_words[plane][i] >> 4 * nibble & 15) * 0x00204081 & 0x01010101)
                      << plane;
      }
      std::memcpy(panel + nibble * kPanelRows * kStep, codes, sizeof codes);
    }
  }
}
#endif

struct AbqKernel {
  TokenLayout layout;
  int largest;
  bool needs_code_sums;
  int digits;  // of a token's element
  int64_t weight_bytes;
  AbqWeights weights;
  int64_t zero_limit;  // up to this magnitude every term of D and their sums fit 32 bits

  ANYBIT_INLINE AbqKernel(const GemmShape& s, const GemmBuffers& b) {
    layout = abq_layout(s);
    weights.n = s.n, weights.planes = s.planes;
    weights.group_words = layout.group_bytes / kAbqWord;
    weights.row_words = (layout.n_groups * weights.group_words + 3) / 4 * 4;
    weights.words = reinterpret_cast<const uint8_t*>(b.weight);
    weights.scale = b.scale;
    weights.zero = s.has_minimum ? nullptr : b.zero;
    weights.minimum = s.has_minimum ? b.minimum : nullptr;
    weight_bytes = 4 * s.planes * weights.n * weights.row_words;
    largest = s.levels - 1;
    needs_code_sums = !s.act_symmetric && s.abits != kAbqWeightOnly;
    digits = abq_digits(s);
    // |P| and |z Q| stay below 128 (levels - 1) L, |zero A| and |z L zero| below 128 L |zero|
    zero_limit = ((int64_t{1} << 31) - 1) / (256 * layout.group_len) - (s.levels - 1);
  }

  ANYBIT_INLINE void unpack(int64_t n0, int64_t position, int steps, uint8_t* panel) const {
    abq_unpack(weights, n0, position / kAbqWord, steps, panel);
  }

  // Of the next panel's rows the cache line with these elements: in the steps in which this line's are
  // multiplied one row after the other, of a plane in each step, or of two.
  ANYBIT_INLINE Ahead ahead(int64_t n0, int64_t position, const uint8_t* panel) const {
    constexpr int64_t kOfLine = 512;
    const int64_t channel = n0 + kPanelRows + position % kOfLine / (kOfLine / kPanelRows);
    if (channel >= weights.n) return {panel};
    const int64_t row = 4 * weights.row_words, plane = weights.n * row;
    const int more = weights.planes > 4 ? weights.planes - 4 : 0;
    return {weights.row(0, channel) + position / kOfLine * 64, row, plane, more * plane,
            smaller(weights.planes, 4) - 1};
  }

  using Terms = AbqGroupTerms;
  ANYBIT_INLINE void read_terms(int64_t group, int64_t n0, Terms& terms) const {
    abq_terms(weights, layout.n_groups, group, n0, terms);
  }

  // outputs += float(D) * scale, D = P - zero A - z Q + L z zero; with a minimum, of which zero is 0,
  // outputs += float(D) * scale + float(A - L z) * minimum.
  ANYBIT_INLINE void add_group(const Terms& terms, int64_t group, const Tokens& tokens, int64_t m0,
                               int count, const Sums* sums, const Sums& code_sums,
                               Outputs* outputs) const {
    const bool narrow = terms.largest_zero <= zero_limit;
    for (int m = 0; m < count; ++m) {
      const int32_t a = tokens.sums[(m0 + m) * layout.n_groups + group], z = tokens.zero[m0 + m];
      const int64_t by_zero = layout.group_len * z - a;
      float* to = outputs[m];
      if (group == 0) std::memset(to, 0, sizeof(Outputs));
      const auto add = [&](const auto& exact) {
        if (weights.minimum) {
          const float sum = float(-by_zero);
          for (int i = 0; i < kPanelRows; ++i)
            to[i] += float(exact(i)) * terms.scale[i] + sum * terms.minimum[i];
        } else {
          for (int i = 0; i < kPanelRows; ++i) to[i] += float(exact(i)) * terms.scale[i];
        }
      };
      if (narrow && z == 0) {
        add([&](int i) { return sums[m][i] + int32_t(by_zero) * terms.zero[i]; });
      } else if (narrow) {
        add([&](int i) {
          return sums[m][i] + int32_t(by_zero) * terms.zero[i] - z * code_sums[i];
        });
      } else {
        add([&](int i) {
          return sums[m][i] + by_zero * terms.zero[i] - int64_t{z} * code_sums[i];
        });
      }
    }
  }

  static constexpr int kMoreRows = kAbqMoreRows;
#if defined(ANYBIT_ABQ_FEW)
  static constexpr int kFewTokens = kAbqFewTokens;
  ANYBIT_INLINE bool takes_few(int64_t m) const { return abq_takes_few(*this, m); }
  template <class T>
  ANYBIT_INLINE void few(const SlabMemory& slab, int m, const Destination<T>& to,
                         const Parallel& parallel) const {
    abq_few(*this, slab, m, to, parallel);
  }
#else
  static constexpr int kFewTokens = 0;
#endif
};

// A16 of tokens that digits do not write (split_token), or where the sums of digits would not fit:
// panels of fp32 weights (q - zero) * scale, or q * scale + minimum.
template <class T>
inline void abq_float_block(const AbqKernel& kernel, const float* rows, int64_t m0, int count,
                            int64_t n0, const Destination<T>& to) {
  constexpr int kLength = 64;  // elements of a panel of floats, 8 KB
  const TokenLayout& layout = kernel.layout;
  alignas(64) uint8_t codes[kLength * kPanelRows];
  alignas(64) Outputs panel[kLength], outputs[kBlock];
  std::memset(outputs, 0, sizeof(Outputs) * size_t(count));
  for (int64_t group = 0; group < layout.n_groups; ++group) {
    AbqGroupTerms terms;
    abq_terms(kernel.weights, layout.n_groups, group, n0, terms);
    for (int64_t first = 0; first < layout.group_len; first += kLength) {
      const int length = int(smaller<int64_t>(kLength, layout.group_len - first));
      const int64_t position = group * layout.group_bytes + first;
      const int whole_words = (length + kAbqWord - 1) / kAbqWord * kAbqWord;
      kernel.unpack(n0, position, whole_words / kStep, codes);
      for (int k = 0; k < length; ++k) {
        const uint8_t* step = codes + k / kStep * kStep * kPanelRows + k % kStep;
        for (int i = 0; i < kPanelRows; ++i)
          panel[k][i] = (float(step[kStep * i]) - float(terms.zero[i])) * terms.scale[i];
        if (!kernel.weights.minimum) continue;
        for (int i = 0; i < kPanelRows; ++i) panel[k][i] += terms.minimum[i];
      }
      dot_floats(panel, length, rows + m0 * layout.k + group * layout.group_len + first, layout.k,
                 count, outputs);
    }
  }
  to.write(outputs, m0, count, n0);
}

template <class T>
inline void abq_float_gemm(const AbqKernel& kernel, const GemmShape& s, const GemmBuffers& b,
                           const Parallel& parallel) {
  float* rows;
  abq_float_memory(s, b.workspace, &rows);
  const T* gamma = s.norm_epsilon > 0 ? static_cast<const T*>(b.gamma) : nullptr;
  for_slabs<T>(s, b, kSlab, [&](const T* x, T* y, int64_t m) {
    for_tokens(m, s.k, parallel, [&](int64_t i) {
      const NormedToken<T> token(x + i * s.k, gamma, s.k, double(s.norm_epsilon));
      alignas(64) float v[kElements];
      for (int64_t first = 0; first < s.k; first += kElements) {
        const int count = int(smaller<int64_t>(kElements, s.k - first));
        token.read(first, count, v);
        std::memcpy(rows + i * s.k + first, v, sizeof(float) * size_t(count));
      }
    });
    const Destination<T> to{y, s.n, b.bias, nullptr};
    for_blocks(m, 4 * s.k, s.n, kernel.weight_bytes, parallel,
               [&](int64_t m0, int count, int64_t n0) {
                 abq_float_block(kernel, rows, m0, count, n0, to);
               });
  });
}

inline void abq_integer_gemm(const GemmShape& s, const GemmBuffers& b, const Parallel& parallel) {
  const AbqKernel kernel(s, b);
  with_dtype(s.dtype, [&](auto t) {
    using T = decltype(t);
    integer_gemm<T>(kernel, s, b, parallel, kernel.digits, [&](const T* x, T* y) {
      GemmShape one = s;
      GemmBuffers own = b;
      one.m = 1, own.x = x, own.y = y;
      own.workspace = static_cast<char*>(b.workspace) + abq_slab_bytes(s);
      abq_float_gemm<T>(kernel, one, own, parallel);
    });
  });
}

inline void abq_gemm(const GemmShape& s, const GemmBuffers& b, const Parallel& parallel) {
  if (abq_digits(s) > 0) return abq_integer_gemm(s, b, parallel);
  const AbqKernel kernel(s, b);
  with_dtype(s.dtype, [&](auto t) { abq_float_gemm<decltype(t)>(kernel, s, b, parallel); });
}

}  // namespace ANYBIT_SET
}  // namespace anybit::cpu
