// The frame of every integer GEMM: tokens become codes, weights become panels, and every panel
// meets all tokens of a block.
//
// An op gives a Kernel:
//   TokenLayout layout             of the tokens, the padded layout of its weights
//   int largest                    code in a panel
//   bool needs_code_sums           whether add_group reads code_sums
//   int64_t weight_bytes           packed, of the whole weight
//   unpack(n0, position, steps, panel)       codes of kPanelRows output channels from n0 on and of
//                                            4 * steps elements from `position` of a row on
//   ahead(n0, position, panel)               what of the packed weights is wanted after this panel
//   Terms, read_terms(group, n0, terms)      what add_group needs of a group and those channels
//   add_group(terms, group, tokens, m0, count, sums, code_sums, outputs)
//                                            outputs[m] = what the scale of token m0 + m multiplies,
//                                            added up group by group
//   kMoreRows                      of the workspace, for its own use
//   kFewTokens, takes_few(m), few(slab, m, to, parallel)
//                                  most tokens that a kernel of its own takes, whether it takes m of
//                                  them with these weights, and the kernel
#pragma once
#include "core/cpu/dot.h"
#include "core/cpu/parallel.h"
#include "core/cpu/tokens.h"

namespace anybit::cpu {
namespace ANYBIT_SET {

constexpr int64_t kSlab = 512;  // most tokens whose codes are in the workspace at a time
constexpr int kTogether =
    96;  // tokens whose sums stay in the nearest cache: whole tiles, all digits
// Tokens that a panel meets before it is unpacked anew. AMX wants their codes in the second cache,
// others read them from the third in time.
constexpr int kBlock = 576;
#if defined(ANYBIT_TILES)
constexpr int64_t kBlockBytes = 1280 << 10;
constexpr int kLeastBlock = 288;
#else
constexpr int64_t kBlockBytes = INT64_MAX;
constexpr int kLeastBlock = kBlock;
#endif
constexpr int64_t kInlineBytes = 128 << 10;  // of packed weights: below, one thread is faster

// Cuts the workspace into arrays; with none it only counts their bytes.
struct Carver {
  char* at;
  size_t used = 0;
  template <class T>
  ANYBIT_INLINE T* take(int64_t count) {
    T* array = at ? reinterpret_cast<T*>(at + used) : nullptr;
    used += (size_t(count) * sizeof(T) + 63) / 64 * 64;
    return array;
  }
};

// Tokens of a slab of a call with m tokens, and rows of the same length for a kernel's own use.
struct SlabMemory {
  Tokens tokens;
  int8_t* ordered;  // [more, row_bytes]
  size_t bytes;
};

ANYBIT_INLINE SlabMemory slab_memory(const TokenLayout& layout, int64_t m, int more, void* memory) {
  Carver carver{static_cast<char*>(memory)};
  const int64_t rows = smaller(m > 1 ? m : 1, kSlab);
  constexpr int64_t kMostOfTile = 16;  // tokens, of any set
  SlabMemory slab;
  slab.tokens.layout = layout;
  slab.tokens.scale = carver.take<float>(rows);
  slab.tokens.zero = carver.take<int32_t>(rows);
  slab.tokens.sums = carver.take<int32_t>(rows * layout.n_groups);
  slab.tokens.codes = carver.take<int8_t>((rows + kMostOfTile - 1) * layout.row_bytes);
  slab.ordered = carver.take<int8_t>(more * layout.row_bytes);
  slab.bytes = carver.used;
  return slab;
}

// Where results go: y [m, n] of the slab, and what is added at the end.
template <class T>
struct Destination {
  T* y;
  int64_t n;
  const float* bias;   // [n], or null
  const float* scale;  // of the tokens, or null
  int digits = 1;      // tokens one after the other of which the sum is one of y's

  // Makes ready for write(): where a row begins is in another cache or in none.
  ANYBIT_INLINE void fetch(int64_t m0, int count, int64_t n0) const {
    for (int64_t row = m0 / digits; row < (m0 + count) / digits; ++row)
      __builtin_prefetch(y + row * n + n0, 1);
  }

  // Outputs of tokens m0 .. m0 + count and output channels n0 .. n0 + width; whole sums.
  ANYBIT_INLINE void write(const Outputs* outputs, int64_t m0, int count, int64_t n0,
                           int width = kPanelRows) const {
    const int columns = int(smaller<int64_t>(width, n - n0));
    alignas(64) float added[kPanelRows] = {}, v[kPanelRows];
    if (bias) std::memcpy(added, bias + n0, sizeof(float) * size_t(columns));
    for (int m = 0; m < count; m += digits) {
      const int last = m + digits - 1;
      const float by = scale ? scale[m0 + last] : 1.0f;
      for (int i = 0; i < kPanelRows; ++i) v[i] = outputs[last][i] * by;
      for (int d = last - 1; d >= m; --d) {
        // the product alone may be beyond the largest number
        for (int i = 0; i < kPanelRows; ++i)
          v[i] = __builtin_fmaf(outputs[d][i], scale[m0 + d], v[i]);
      }
      if (bias) {
        for (int i = 0; i < kPanelRows; ++i) v[i] += added[i];
      }
      store_saturated(v, columns, y + (m0 + m) / digits * n + n0);
    }
  }
};

// Tasks that share `blocks` blocks of weights of `bytes` bytes in all, for m tokens: few enough that
// each is worth a thread's while, and that the block behind a block is mostly the same thread's, which
// has fetched it.
struct Shares {
  int64_t blocks_per_task, count;
};

ANYBIT_INLINE Shares shares_of(int64_t blocks, int64_t bytes, int64_t m, int64_t threads) {
  constexpr int64_t kTasksOfThread = 4;
  const int64_t work = bytes * ((m + 7) / 8);
  const int64_t worth = work < kInlineBytes ? 1 : work / (kInlineBytes / 2);
  const int64_t wanted = smaller(worth, kTasksOfThread * threads);
  const int64_t per_task = (blocks + smaller(wanted, blocks) - 1) / smaller(wanted, blocks);
  return {per_task, (blocks + per_task - 1) / per_task};
}

// The same for blocks that one task takes side by side, `most` at a time: as few tasks as keep every
// thread busy, since reading far along is faster.
ANYBIT_INLINE Shares wide_shares(int64_t blocks, int64_t most, int64_t bytes, int64_t threads) {
  const int64_t least = (blocks + most - 1) / most;
  const int64_t rounds = bytes < kInlineBytes ? 1 : (least + threads - 1) / threads * threads;
  const int64_t per_task = (blocks + smaller(rounds, blocks) - 1) / smaller(rounds, blocks);
  return {per_task, (blocks + per_task - 1) / per_task};
}

template <class Kernel, class T>
inline void panel_block(const Kernel& kernel, const Tokens& tokens, int64_t m0, int count,
                        int64_t n0, const Destination<T>& to) {
  const TokenLayout& layout = tokens.layout;
  alignas(64) Panel panel;
  alignas(64) Sums sums[kBlock], code_sums;
  alignas(64) Outputs outputs[kBlock];
  constexpr int kElementsOfPanel = kStep * kPanelSteps;
#if defined(ANYBIT_TILES)
  const TileScope tiles(int(layout.run / kStep));
#endif
  typename Kernel::Terms terms;
  for (int64_t group = 0; group < layout.n_groups; ++group) {
    kernel.read_terms(group, n0, terms);
    for (int64_t first = 0; first < layout.group_bytes; first += kElementsOfPanel) {
      const int64_t position = group * layout.group_bytes + first;
      const int64_t left = layout.group_bytes - first;
      const int steps = int(smaller<int64_t>(kElementsOfPanel, left)) / kStep;
      const bool last = group + 1 == layout.n_groups && left <= kElementsOfPanel;
      const Ahead ahead = kernel.ahead(n0, position, panel);
      kernel.unpack(n0, position, steps, panel);
      if (kernel.needs_code_sums) dot_ones(panel, steps, first == 0, code_sums, kernel.largest);
      for (int m = 0; m < count; m += kTogether) {
        const int some = smaller(kTogether, count - m);
        dot(panel, steps, tokens, m0 + m, position, some, first == 0, sums + m, kernel.largest,
            m == 0 ? ahead : Ahead{panel}, [&](int i, int next) {
              if (last) to.fetch(m0 + m + i, next, n0);
            });
        if (left <= kElementsOfPanel)
          kernel.add_group(terms, group, tokens, m0 + m, some, sums + m, code_sums, outputs + m);
      }
    }
  }
  to.write(outputs, m0, count, n0);
}

// Calls body(m0, count, n0) for blocks of m tokens of `token_bytes` bytes each and kPanelRows of n
// output channels, whose packed weights have `bytes` bytes.
template <class F>
ANYBIT_INLINE void for_blocks(int64_t m, int64_t token_bytes, int64_t n, int64_t bytes,
                              const Parallel& parallel, const F& body) {
  const int64_t blocks = (n + kPanelRows - 1) / kPanelRows;
  const Shares shares = shares_of(blocks, bytes, m, parallel.threads);
  const int64_t near = kBlockBytes / token_bytes;
  const int64_t most = near < kLeastBlock ? kLeastBlock : near < kBlock ? near : kBlock;
  const int64_t least = (m + most - 1) / most;
  // every thread gets two tasks
  const int64_t wanted = (2 * parallel.threads + shares.count - 1) / shares.count;
  const int64_t parts = smaller(wanted, (m + kTogether - 1) / kTogether);
  const int64_t token_blocks = parts > least ? parts : least;
  const int64_t even = (m + token_blocks - 1) / token_blocks;
  const int64_t per_block = (even + kTogether - 1) / kTogether * kTogether;
  parallel(size_t(shares.count * token_blocks), [&](size_t task) {
    const int64_t m0 = int64_t(task) / shares.count * per_block;
    const int64_t count = smaller(per_block, m - m0);
    const int64_t first = int64_t(task) % shares.count * shares.blocks_per_task;
    const int64_t last = smaller(first + shares.blocks_per_task, blocks);
    for (int64_t block = first; block < last && count > 0; ++block)
      body(m0, int(count), block * kPanelRows);
  });
}

// Whether a kernel of the op's own takes m tokens.
template <class Kernel>
ANYBIT_INLINE bool are_few(const Kernel& kernel, int64_t m) {
  if constexpr (Kernel::kFewTokens > 0) return m <= Kernel::kFewTokens && kernel.takes_few(m);
  return false;
}

template <class Kernel, class T>
inline void slab_gemm(const Kernel& kernel, const SlabMemory& slab, int64_t m,
                      const Destination<T>& to, const Parallel& parallel) {
  if constexpr (Kernel::kFewTokens > 0) {
    if (are_few(kernel, m)) return kernel.few(slab, int(m), to, parallel);
  }
  for_blocks(m, slab.tokens.layout.row_bytes, to.n, kernel.weight_bytes, parallel,
             [&](int64_t m0, int count, int64_t n0) {
               panel_block(kernel, slab.tokens, m0, count, n0, to);
             });
}

// Calls body(x, y, tokens) for each slab, of up to `most` of the tokens of a call.
template <class T, class F>
ANYBIT_INLINE void for_slabs(const GemmShape& s, const GemmBuffers& b, int64_t most,
                             const F& body) {
  for (int64_t m0 = 0; m0 < s.m; m0 += most)
    body(static_cast<const T*>(b.x) + m0 * s.k, static_cast<T*>(b.y) + m0 * s.n,
         smaller<int64_t>(most, s.m - m0));
}

// Calls body(m) for each of m tokens of k elements, shared among threads where there are many.
template <class F>
ANYBIT_INLINE void for_tokens(int64_t m, int64_t k, const Parallel& parallel, const F& body) {
  constexpr int64_t kElementsPerTask = 1 << 12;
  const int64_t per_task = (kElementsPerTask + k - 1) / k;
  parallel(size_t((m + per_task - 1) / per_task), [&](size_t task) {
    const int64_t last = smaller<int64_t>((int64_t(task) + 1) * per_task, m);
    for (int64_t i = int64_t(task) * per_task; i < last; ++i) body(i);
  });
}

struct NoSplitTokens {
  template <class T>
  void operator()(const T*, T*) const {}
};

// digits: codes of a token's element; 1, or 3 or 4 where tokens are not quantized.
// otherwise(x, y): of the latter, makes the row of y of a token that split_token could not write.
template <class T, class Kernel, class F = NoSplitTokens>
inline void integer_gemm(const Kernel& kernel, const GemmShape& s, const GemmBuffers& b,
                         const Parallel& parallel, int digits = 1, const F& otherwise = {}) {
  SlabMemory slab =
      slab_memory(kernel.layout, int64_t{s.m} * digits, Kernel::kMoreRows, b.workspace);
  const T* gamma = s.norm_epsilon > 0 ? static_cast<const T*>(b.gamma) : nullptr;
  for_slabs<T>(s, b, kSlab / digits, [&](const T* x, T* y, int64_t m) {
    slab.tokens.layout.tile_tokens = are_few(kernel, m * digits) ? 1 : kTokensOfTile;
    for_tokens(m, s.k, parallel, [&](int64_t i) {
      const NormedToken<T> token(x + i * s.k, gamma, s.k, double(s.norm_epsilon));
      if (digits > 1) return split_token(token, digits, slab.tokens, i * digits);
      quantize_token(token, s.abits, s.act_symmetric != 0, slab.tokens, i);
    });
    const Destination<T> to{y, s.n, b.bias, slab.tokens.scale, digits};
    slab_gemm(kernel, slab, m * digits, to, parallel);
    for (int64_t i = 0; i < m && digits > 1; ++i) {
      const float scale = slab.tokens.scale[i * digits];
      if (scale != scale) otherwise(x + i * s.k, y + i * s.n);
    }
  });
}

}  // namespace ANYBIT_SET
}  // namespace anybit::cpu
