// QQQGemm for a few tokens: words are read once, straight from memory, in the order in which they lie.
//
// Eight rows are walked together, 64 bytes of each in turn, and whole rows where one thread may: of
// one block all the way down, every 512 bytes would be in another page, and of one row at a time the
// sums would be read and written for every 512 bytes.
//
// A set's file has QqqSums of a block and a token, QqqCodes and qqq_codes(), QqqFewTables and
// qqq_few_tables() for groups, qqq_chunk() and qqq_collect().
#pragma once
#if defined(__AVX512VNNI__)
#include "qqq_gemm/cpu/few_avx512.h"
#else
#include "qqq_gemm/cpu/few_neon.h"
#endif

namespace anybit::cpu {
namespace ANYBIT_SET {

constexpr int kQqqMostBlocks = 64;  // of a task
constexpr int kQqqMostSums = 128;   // blocks times tokens, 256 bytes each, which stay in the cache
constexpr int kQqqAhead = 2;  // blocks: the processor finds no streams in 64 bytes here and there

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
    constexpr int kFit = kQqqMostSums / kTokens;
    constexpr int kBlocks = kFit < kQqqMostBlocks ? kFit : kQqqMostBlocks;
    for (int64_t block = first_block; block < last_block; block += kBlocks)
      column<kTokens, kGrouped, kBlocks>(block, int(smaller<int64_t>(kBlocks, last_block - block)));
  }

  // kRows packed rows from row0 on, of `count` blocks. Groups have as many.
  template <int kTokens, bool kGrouped, int kRows>
  inline void rows(int64_t row0, int64_t block0, int count, QqqSums* sums) const {
    const auto& w = kernel.weights;
    QqqCodes codes[kRows * kTokens];
    for (int row = 0; row < kRows; ++row) {
      for (int m = 0; m < kTokens; ++m) {
        const int8_t* from = tokens.codes + m * tokens.layout.row_bytes + kQqqRow * (row0 + row);
        codes[row * kTokens + m] = qqq_codes<kGrouped>(from);
      }
    }
    for (int block = 0; block < count; ++block) {
      QqqFewTables tables;
      if (kGrouped) qqq_few_tables(w, row0 / kRows, block0 + block, tables);
      const bool next_rows = block + kQqqAhead >= count;
      const int64_t ahead =
          kQqqAhead - (next_rows ? count : 0) + (next_rows ? kRows * w.blocks : 0);
      qqq_chunk<kTokens, kGrouped, kRows>(w.at(row0, block0 + block), w.blocks * kQqqBlockBytes,
                                          ahead * kQqqBlockBytes, codes, tables,
                                          sums + block * kTokens);
    }
  }

  // All packed rows of up to kBlocks blocks.
  template <int kTokens, bool kGrouped, int kBlocks>
  ANYBIT_INLINE void column(int64_t block0, int count) const {
    const auto& w = kernel.weights;
    const int64_t n_rows = tokens.layout.group_bytes / kQqqRow;
    alignas(64) QqqSums sums[kBlocks * kTokens];
    std::memset(sums, 0, sizeof(QqqSums) * size_t(count * kTokens));
    int64_t row = 0;
    if (!kGrouped || w.group_size == 8 * kQqqRow) {
      for (; row + 8 <= n_rows; row += 8) rows<kTokens, kGrouped, 8>(row, block0, count, sums);
    }
    for (; row + 4 <= n_rows; row += 4) rows<kTokens, kGrouped, 4>(row, block0, count, sums);
    for (; row < n_rows; ++row) rows<kTokens, false, 1>(row, block0, count, sums);
    for (int block = 0; block < count; ++block) {
      alignas(64) Sums halves[kTokens][2];
      alignas(64) Outputs outputs;
      for (int m = 0; m < kTokens; ++m) {
        qqq_collect(sums[block * kTokens + m], halves[m][0]);
        for (int half = 0; half < 2; ++half) {
          const int64_t n0 = (block0 + block) * kQqqBlock + half * kPanelRows;
          if (n0 >= w.n) break;
          typename Kernel::Terms terms;
          kernel.read_terms(0, n0, terms);
          kernel.add_group(terms, 0, tokens, m, 1, &halves[m][half], halves[m][half], &outputs);
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
  const Shares shares = wide_shares(blocks, kQqqMostBlocks, kernel.weight_bytes, parallel.threads);
  parallel(size_t(shares.count), [&](size_t task) {
    const int64_t first = int64_t(task) * shares.blocks_per_task;
    const int64_t last = smaller(first + shares.blocks_per_task, blocks);
    with_count<kQqqFewTokens>(m, QqqFewCall<Kernel, T>{kernel, slab.tokens, to, first, last});
  });
}

}  // namespace ANYBIT_SET
}  // namespace anybit::cpu
