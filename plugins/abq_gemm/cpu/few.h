// ABQGemm for a few tokens: weights are turned into codes where they are read, row after row, and meet
// a few tokens at a time.
#pragma once
#if defined(__AVX512VNNI__)
#include "abq_gemm/cpu/few_avx512.h"
#elif defined(__ARM_FEATURE_DOTPROD)
#include "abq_gemm/cpu/few_neon.h"
#else
#include "abq_gemm/cpu/few_avx2.h"
#endif

namespace anybit::cpu {
namespace ANYBIT_SET {

constexpr int kAbqMostSums = 1024;  // groups times operands: 128 KB of the stack

// Tokens that meet the weights together: all digits of one, and as many as there is room for the sums of.
template <class Kernel>
ANYBIT_INLINE int abq_together(const Kernel& kernel) {
  const int64_t room = kAbqMostSums / kernel.layout.n_groups;
  const int ones = kernel.needs_code_sums ? 1 : 0;
  return (int(smaller<int64_t>(room, kAbqTogether)) - ones) / kernel.digits * kernel.digits;
}

// Whether there are few enough groups.
template <class Kernel>
ANYBIT_INLINE bool abq_takes_few(const Kernel& kernel, int64_t m) {
  return abq_together(kernel) >= smaller<int64_t>(m, kernel.digits == 3 ? 3 : 4);
}

// Sums of up to 32 rows from n on.
struct AbqSumsCall {
  const AbqRows& w;
  const TokenLayout& layout;
  int64_t n;
  int columns;
  Sums* sums;
  template <int kOperands>
  ANYBIT_INLINE void operator()() const {
    abq_few_rows<kOperands>(w, layout, n, columns, sums);
  }
};

template <class Kernel, class T>
inline void abq_few(const Kernel& kernel, const SlabMemory& slab, int m, const Destination<T>& to,
                    const Parallel& parallel) {
  const Tokens& tokens = slab.tokens;
  const TokenLayout& layout = tokens.layout;
  const int planes = kernel.weights.planes;
  const int more = kernel.needs_code_sums ? 1 : 0;
  const int together = abq_together(kernel);
  // as many tokens as meet the weights together, and ones behind them
  const auto ordered = [&](int i) {
    return slab.ordered + (i / together * (together + more) + i % together) * layout.row_bytes;
  };
  for (int i = 0; i < m; ++i)
    abq_few_order(layout, tokens.codes + i * layout.row_bytes, planes, ordered(i));
  for (int m0 = 0; m0 < m && more; m0 += together) {
    int8_t* ones = ordered(m0) + smaller(together, m - m0) * layout.row_bytes;
    std::memset(ones, 1, size_t(layout.row_bytes));
  }
  const int64_t row_bytes = 4 * kernel.weights.row_words;
  const AbqRows rows = {kernel.weights.words,
                        kernel.weights.scale,
                        kernel.weights.offsets(),
                        to.n,
                        row_bytes,
                        to.n * row_bytes,
                        planes,
                        nullptr,
                        layout.row_bytes,
                        layout.n_groups,
                        layout.group_bytes};
  for_blocks(
      1, layout.row_bytes, to.n, kernel.weight_bytes, parallel, [&](int64_t, int, int64_t n0) {
        alignas(64) Sums sums[kAbqMostSums];
        alignas(64) Outputs outputs[kAbqTogether];
        const int columns = int(smaller<int64_t>(kPanelRows, to.n - n0));
        for (int m0 = 0; m0 < m; m0 += together) {
          const int count = smaller(together, m - m0), operands = count + more;
          AbqRows of_tokens = rows;
          of_tokens.operands = ordered(m0);
          std::memset(sums, 0, sizeof(Sums) * size_t(layout.n_groups * operands));
          with_count<kAbqTogether>(operands, AbqSumsCall{of_tokens, layout, n0, columns, sums});
          AbqGroupTerms terms[kAbqGroupsTogether];
          for (int64_t group = 0; group < layout.n_groups; ++group) {
            const int64_t in_four = group % kAbqGroupsTogether;
#if defined(__AVX512VNNI__)
            const bool four = group - in_four + kAbqGroupsTogether <= layout.n_groups;
            if (four && in_four == 0)
              abq_terms_of_four(kernel.weights, layout.n_groups, group, n0, terms);
#else
        const bool four = false;
#endif
            if (!four) abq_terms(kernel.weights, layout.n_groups, group, n0, terms[in_four]);
            const Sums* of_group = sums + group * operands;
            kernel.add_group(terms[in_four], group, tokens, m0, count, of_group,
                             of_group[operands - 1], outputs);
          }
          to.write(outputs, m0, count, n0);
        }
      });
}

}  // namespace ANYBIT_SET
}  // namespace anybit::cpu
