// Attention with its cache on a CPU: first the cache takes the new rows in, then blocks of queries
// meet blocks of keys and values with a running softmax, all in fp32. Compiled once for each
// instruction set.
//
// The context of a query depends on that query and the keys it sees alone, to the bit: sums are in
// one order whatever else a call computes, so that a token is the same alone, in a chunk, behind a
// cached beginning and on any number of threads. A dot product is summed like the lanes of a vector
// (ScoreCall), keys in blocks of kKeys from key 0 on, blocks in spans of kSpan, and spans in turn.
//
// The query heads of a key-value head are rows of one matrix, ordered by position and then by head,
// so that keys and values are read once for all of them.
#pragma once
#include "cached_attention/cpu/attention.h"
#include "cached_attention/cpu/codes.h"
#include "core/cpu/dot.h"

namespace anybit::cpu {
namespace ANYBIT_SET {

constexpr int kKeys = 64;     // keys and values of a block
constexpr int kRows = 192;    // query rows of a block, about
constexpr int kTileRows = 6;  // query rows whose sums are in registers together
constexpr int kTileVectors = kWide == 16 ? 4 : 2;  // and output columns
// Of a block: keys are not turned round for so few.
constexpr int kFewRows = kWide == 16 ? 32 : kWide == 8 ? 12 : 4;
constexpr int kFewTile = 4;     // of these, whose sums are in registers together
constexpr int64_t kSpan = 512;  // keys whose sums begin anew; a task, where there are few rows
constexpr int64_t kInline = 1 << 17;  // multiplications: fewer are not worth waking threads for

constexpr int kLanesLog = kWide == 16 ? 4 : kWide == 8 ? 3 : 2;

// The bits of a lane's number the other way round: in this order lanes lie next to those that
// sum_of() adds them to.
ANYBIT_INLINE constexpr int reversed(int lane) {
  int found = 0;
  for (int bit = 0; bit < kLanesLog; ++bit) found |= (lane >> bit & 1) << (kLanesLog - 1 - bit);
  return found;
}

ANYBIT_INLINE constexpr int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// scores[r][j] = sum over d of query[r][d] * keys[j][d], of turned keys.
//
// The sum is that of FewScoreCall to the bit: the products of each lane of a vector in turn, then the
// lanes as sum_of() adds them. A half of such a sum waits until the other is done, as the digits of a
// binary counter do.
struct ScoreCall {
  const float *query, *turned;
  int64_t width;
  float* scores;

  template <int kCount>
  ANYBIT_INLINE void operator()() const {
    for (int j = 0; j < kKeys; j += kTileVectors * kWide) part<kCount>(j);
  }

  template <int kCount>
  ANYBIT_INLINE void part(int j) const {
    const int64_t depth = width / kWide;
    V halves[kLanesLog][kCount][kTileVectors];
    for (int i = 0; i < kWide; ++i) {
      const int lane = reversed(i);
      const float* key = turned + lane * depth * kKeys + j;
      V sums[kCount][kTileVectors];
      for (int r = 0; r < kCount; ++r) {
        for (int v = 0; v < kTileVectors; ++v) sums[r][v] = splat(0.0f);
      }
#pragma GCC unroll 4
      for (int64_t k = 0; k < depth; ++k, key += kKeys) {
        V row[kTileVectors];
        for (int v = 0; v < kTileVectors; ++v) row[v] = load(key + kWide * v);
#pragma GCC unroll 6
        for (int r = 0; r < kCount; ++r) {
          const V x = splat(query[r * width + k * kWide + lane]);
#pragma GCC unroll 4
          for (int v = 0; v < kTileVectors; ++v) sums[r][v] = fused(x, row[v], sums[r][v]);
        }
      }
      int level = 0;
      for (; i >> level & 1; ++level) {
        for (int r = 0; r < kCount; ++r) {
          for (int v = 0; v < kTileVectors; ++v) sums[r][v] = add(halves[level][r][v], sums[r][v]);
        }
      }
      for (int r = 0; r < kCount; ++r) {
        for (int v = 0; v < kTileVectors; ++v) {
          if (level < kLanesLog) halves[level][r][v] = sums[r][v];
          else store(scores + r * kKeys + j + kWide * v, sums[r][v]);
        }
      }
    }
  }
};

// Rows of a cache that are wanted next, fetched one by one while others are computed with: between
// blocks the processor forgets where it was reading.
struct NextRows {
  const char* from = nullptr;
  size_t row_bytes = 0;
  int rows = 0;

  ANYBIT_INLINE void fetch(int row) const {
    if (row >= rows) return;
    const char* at = from + size_t(row) * row_bytes;
    for (size_t byte = 0; byte < row_bytes; byte += 64) __builtin_prefetch(at + byte);
  }
  ANYBIT_INLINE void fetch_all() const {
    for (int row = 0; row < rows; ++row) fetch(row);
  }
};

// The same scores for few rows, of keys [keys][width] of any type as they are: products add up in the
// lanes of a vector, and sum_of() adds these.
template <class E>
struct FewScoreCall {
  const float* query;
  const E* rows;
  int64_t width;
  int keys;
  float* scores;
  NextRows next;

  template <int kCount>
  ANYBIT_INLINE void operator()() const {
    for (int j = 0; j < keys; j += kSumsTogether) {
      const E* row[kSumsTogether];  // behind the last key the last one, which nobody sees
      for (int i = 0; i < kSumsTogether; ++i) {
        row[i] = rows + smaller(j + i, keys - 1) * width;
        next.fetch(j + i);
      }
      V sums[kCount][kSumsTogether] = {};
      for (int64_t d = 0; d < width; d += kWide) {
        V x[kCount];
        for (int r = 0; r < kCount; ++r) x[r] = load(query + r * width + d);
#pragma GCC unroll 8
        for (int i = 0; i < kSumsTogether; ++i) {
          const V key = load(row[i] + d);
#pragma GCC unroll 4
          for (int r = 0; r < kCount; ++r) sums[r][i] = fused(x[r], key, sums[r][i]);
        }
      }
      for (int r = 0; r < kCount; ++r) store_sums(sums[r], scores + r * kKeys + j);
    }
  }
};

// context[r][n] = context[r][n] * factor[r] + sum over keys j of weights[r][j] * values[j][n].
// kFew: of `keys` values, else of kKeys.
template <class E, bool kFew>
struct ValueCall {
  const float* weights;
  const E* values;
  int keys;
  const float* factor;
  int64_t width;  // whole vectors
  float* context;
  NextRows next;  // where there are few rows

  template <int kCount>
  ANYBIT_INLINE void operator()() const {
    int n = 0;
    for (; n + kTileVectors * kWide <= width; n += kTileVectors * kWide)
      part<kCount, kTileVectors>(n);
    for (; n < width; n += kWide) part<kCount, 1>(n);
  }

  template <int kCount, int kVectors>
  ANYBIT_INLINE void part(int n) const {
    V sums[kCount][kVectors];
    for (int r = 0; r < kCount; ++r) {
      for (int v = 0; v < kVectors; ++v) sums[r][v] = multiply(splat(factor[r]), load(at(r, n, v)));
    }
    for (int j = 0; j < (kFew ? keys : kKeys); ++j) {
      if (kFew && n == 0) next.fetch(j);
      V row[kVectors];
      for (int v = 0; v < kVectors; ++v) row[v] = load(values + j * width + n + kWide * v);
#pragma GCC unroll 6
      for (int r = 0; r < kCount; ++r) {
        const V x = splat(weights[r * kKeys + j]);
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) sums[r][v] = fused(x, row[v], sums[r][v]);
      }
    }
    for (int r = 0; r < kCount; ++r) {
      for (int v = 0; v < kVectors; ++v) store(at(r, n, v), sums[r][v]);
    }
  }

  ANYBIT_INLINE float* at(int r, int n, int v) const { return context + r * width + n + kWide * v; }
};

// turned[d % kWide][d / kWide][j] = rows[j][d] of kKeys rows, d below a multiple of 16.
inline void turn(const float* rows, int64_t width, float* turned) {
  const auto of = [&](int64_t d) {
    return turned + (d % kWide * (width / kWide) + d / kWide) * kKeys;
  };
#if defined(__AVX2__)
  for (int64_t d = 0; d < width; d += 8) {
    for (int j = 0; j < kKeys; j += 8) {
      __m256 a[8], b[8];
      for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(rows + (j + i) * width + d);
      for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
      }
      for (int i = 0; i < 8; i += 4) {
        a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
        a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
        a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
        a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
      }
      for (int i = 0; i < 4; ++i) {
        _mm256_storeu_ps(of(d + i) + j, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
        _mm256_storeu_ps(of(d + i + 4) + j, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
      }
    }
  }
#else
  for (int j = 0; j < kKeys; ++j) {
    for (int64_t d = 0; d < width; ++d) of(d)[j] = rows[j * width + d];
  }
#endif
}

// What rows have of the keys so far.
struct RowSums {
  float *context, *top, *total;  // [rows][width], largest score, sum of weights

  static constexpr int64_t floats(int64_t width, int64_t rows) {
    return rows * width + 2 * rounded_up(rows, 2);
  }
  ANYBIT_INLINE RowSums(float* at, int64_t width, int64_t rows)
      : context(at), top(at + rows * width), total(top + rounded_up(rows, 2)) {}

  ANYBIT_INLINE void clear(int64_t width, int64_t rows) const {
    std::memset(context, 0, sizeof(float) * size_t(rows * width));
    for (int64_t i = 0; i < rows; ++i) top[i] = -__builtin_huge_valf(), total[i] = 0;
  }
};

// What one thread needs for a block of rows.
struct Block {
  float *rows, *turned, *values;  // keys [kKeys][width], turned round, values as keys
  float* query;                   // [rows][width]
  float* scores;                  // [rows][kKeys], then weights; of few rows for a whole span
  float* factor;                  // [rows]: see weigh()
  RowSums sums;                   // of all spans
  RowSums span;                   // of one
  uint64_t* seen;                 // [positions]: which keys of the block a position sees

  // Of few rows, as the last block of a call may have them, for a whole span.
  static constexpr int64_t scores_of(int64_t rows) {
    const int64_t few = smaller<int64_t>(rows, kFewRows) * kSpan, many = rows * kKeys;
    return few > many ? few : many;
  }
  static constexpr int64_t bytes(int64_t width, int64_t rows) {
    const int64_t floats = 3 * kKeys * width + rows * width + scores_of(rows) +
                           rounded_up(rows, 2) + 2 * RowSums::floats(width, rows);
    return int64_t(sizeof(float)) * floats + int64_t(sizeof(uint64_t)) * rows;
  }
  ANYBIT_INLINE Block(void* memory, int64_t width, int64_t count)
      : rows(static_cast<float*>(memory)),
        turned(rows + kKeys * width),
        values(turned + kKeys * width),
        query(values + kKeys * width),
        scores(query + count * width),
        factor(scores + scores_of(count)),
        sums(factor + rounded_up(count, 2), width, count),
        span(sums.context + RowSums::floats(width, count), width, count),
        seen(reinterpret_cast<uint64_t*>(span.context + RowSums::floats(width, count))) {}
};

// Weights of one row in place of its scores: exp(score - top), where `seen` has a bit. Returns what
// the sums so far are to be multiplied by.
template <class T>
ANYBIT_INLINE float weigh(float* scores, uint64_t seen, const AttentionShape& s, float& top,
                          float& total) {
  constexpr float kNever = -__builtin_huge_valf();
  const V never = splat(kNever), scale = splat(s.scale);
  if (s.softcap > 0) round_floats<T>(scores, kKeys);  // as the body does
  V most = never;
  for (int i = 0; i < kKeys; i += kWide) {
    V x = multiply(load(scores + i), scale);
    if (s.softcap > 0) x = multiply(tangent(divide(x, splat(s.softcap))), splat(s.softcap));
    x = select(uint32_t(seen >> i), x, never);
    store(scores + i, x);
    most = largest(x, most);
  }
  const float found = largest_of(most), before = top;
  top = found > before ? found : before;
  // Nothing seen yet; subtracting 0 leaves all weights 0.
  const V by = splat(top == kNever ? 0.0f : top);
  V sum = splat(0.0f);
  for (int i = 0; i < kKeys; i += kWide) {
    const V weight = exponential(subtract(load(scores + i), by));
    store(scores + i, weight);
    sum = add(sum, weight);
  }
  alignas(64) float factor[kWide];
  store(factor, exponential(subtract(splat(before), by)));
  total = total * factor[0] + sum_of(sum);
  return factor[0];
}

// The sums of earlier spans take in those of the next.
inline void join(const RowSums& sums, const RowSums& span, int64_t width, int64_t rows) {
  for (int64_t row = 0; row < rows; ++row) {
    const float before = sums.top[row], found = span.top[row];
    const float top = found > before ? found : before;
    const float by = top == -__builtin_huge_valf() ? 0.0f : top;
    const V kept = exponential(splat(before - by)), taken = exponential(splat(found - by));
    // with few rows a sum may be -0 that is 0 with many, behind keys that there are not
    const auto joined = [&](V a, V b) {
      return fused(taken, add(b, splat(0.0f)), multiply(kept, a));
    };
    alignas(64) float total[kWide];
    store(total, joined(splat(sums.total[row]), splat(span.total[row])));
    sums.top[row] = top, sums.total[row] = total[0];
    for (int64_t at = row * width; at < (row + 1) * width; at += kWide)
      store(sums.context + at, joined(load(sums.context + at), load(span.context + at)));
  }
}

template <class T>
struct Attention {
  const AttentionShape& s;
  const AttentionBuffers& b;
  int64_t groups, width, present;  // width: head_dim in whole vectors

  ANYBIT_INLINE Attention(const AttentionShape& shape, const AttentionBuffers& buffers)
      : s(shape),
        b(buffers),
        groups(shape.heads / shape.kv_heads),
        width(rounded_up(shape.head_dim, 16)),
        present(shape.present()) {}

  // Rows of the cache that hold tokens once the new ones are in it.
  ANYBIT_INLINE int64_t filled(int64_t sequence) const {
    return s.static_cache ? b.write_indices[sequence] + s.tokens : present;
  }

  // A cache's tensors: its rows, and of few bits their scales.
  struct Cache {
    const void *fresh, *past;
    void* present;
    const float* past_scale;
    float* present_scale;
  };
  ANYBIT_INLINE Cache key_cache() const {
    return {b.key, b.past_key, b.present_key, b.past_key_scale, b.present_key_scale};
  }
  ANYBIT_INLINE Cache value_cache() const {
    return {b.value, b.past_value, b.present_value, b.past_value_scale, b.present_value_scale};
  }

  ANYBIT_INLINE size_t row_bytes() const {
    return s.low_bits() ? size_t(s.bits * s.head_dim / 8) : size_t(s.head_dim) * sizeof(T);
  }

  // Copies the past of one sequence and key-value head, `head` of all of them.
  ANYBIT_INLINE void keep(int64_t head, const void* past, void* cache, size_t bytes) const {
    if (past != cache && s.past)
      std::memcpy(static_cast<char*>(cache) + size_t(head * present) * bytes,
                  static_cast<const char*>(past) + size_t(head * s.past) * bytes,
                  size_t(s.past) * bytes);
  }

  // The cache of a head takes its new rows in.
  ANYBIT_INLINE void take_in(int64_t head, const Cache& cache) const {
    const int64_t first = s.static_cache ? b.write_indices[head / s.kv_heads] : s.past;
    const int64_t at = head * present + first;
    const T* fresh = static_cast<const T*>(cache.fresh) + head * s.tokens * s.head_dim;
    keep(head, cache.past, cache.present, row_bytes());
    char* to = static_cast<char*>(cache.present) + size_t(at) * row_bytes();
    if (!s.low_bits()) {
      if (s.tokens) std::memcpy(to, fresh, size_t(s.tokens) * row_bytes());
      return;
    }
    keep(head, cache.past_scale, cache.present_scale, 2 * sizeof(float));
    for (int64_t i = 0; i < s.tokens; ++i)
      store_row(fresh + i * s.head_dim, s.head_dim, s.bits,
                reinterpret_cast<int8_t*>(to + size_t(i) * row_bytes()),
                cache.present_scale + 2 * (at + i));
  }

  ANYBIT_INLINE const char* row_at(const Cache& cache, int64_t head, int64_t row) const {
    return static_cast<const char*>(cache.present) + size_t(head * present + row) * row_bytes();
  }

  // The block of rows from `first` on, or the next head's first where this one has no more.
  ANYBIT_INLINE NextRows next_rows(const Cache& cache, int64_t head, int64_t first) const {
    if (first >= filled(head / s.kv_heads)) first = 0, ++head;
    if (head >= int64_t{s.batch} * s.kv_heads) return {};
    const int64_t left = filled(head / s.kv_heads) - first;
    return {row_at(cache, head, first), row_bytes(), int(smaller<int64_t>(kKeys, left))};
  }

  ANYBIT_INLINE void load_rows(const Cache& cache, int64_t head, int64_t first, int count,
                               float* to, const NextRows& next) const {
    const int64_t at = head * present + first;
    const char* from = row_at(cache, head, first);
    for (int j = 0; j < kKeys; ++j, from += row_bytes(), to += width) {
      const int used = j < count ? s.head_dim : 0;
      next.fetch(j);
      if (used && s.low_bits())
        load_row<T>(reinterpret_cast<const int8_t*>(from), cache.present_scale + 2 * (at + j), used,
                    s.bits, to);
      else if (used) load_floats(reinterpret_cast<const T*>(from), used, to);
      for (int64_t d = used; d < width; ++d) to[d] = 0;
    }
  }

  ANYBIT_INLINE void load_queries(int64_t head, int64_t position, int64_t count, float* to) const {
    const int64_t sequence = head / s.kv_heads, first = head % s.kv_heads * groups;
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t g = 0; g < groups; ++g, to += width) {
        const int64_t row = (sequence * s.heads + first + g) * s.tokens + position + i;
        load_floats(static_cast<const T*>(b.query) + row * s.head_dim, s.head_dim, to);
        for (int64_t d = s.head_dim; d < width; ++d) to[d] = 0;
      }
    }
  }

  // Calls body(first, count) for tiles of kTile rows of which one sees a key of the block.
  template <int kTile, class F>
  ANYBIT_INLINE void for_tiles(const Block& block, int64_t rows, const F& body) const {
    for (int64_t row = 0; row < rows; row += kTile) {
      const int count = int(smaller<int64_t>(kTile, rows - row));
      uint64_t any = 0;
      for (int64_t i = row / groups; i <= (row + count - 1) / groups; ++i) any |= block.seen[i];
      if (any) body(row, count);
    }
  }

  // `positions` queries of a key-value head from `position` on, and keys first .. last of a span.
  struct Meeting {
    int64_t head, position, positions, first, last;
  };

  // Their sums stay in the block. Returns whether the queries see any of the keys.
  inline bool meet(const Block& block, const Meeting& m) const {
    block.span.clear(width, m.positions * groups);
    return m.positions * groups <= kFewRows ? meet_few(block, m) : meet_many(block, m);
  }

  // Calls body(at, count) for blocks of keys of which some are seen; returns whether there are any.
  template <class F>
  ANYBIT_INLINE bool for_keys(const Block& block, const Meeting& m, const F& body) const {
    const int64_t of_mask = s.masks == 1 ? 0 : m.head / s.kv_heads;
    const uint8_t* mask = b.mask + (of_mask * s.tokens + m.position) * present;
    bool met = false;
    for (int64_t at = m.first; at < m.last; at += kKeys) {
      const int keys = int(smaller<int64_t>(kKeys, m.last - at));
      uint64_t any = 0;
      for (int64_t i = 0; i < m.positions; ++i) {
        block.seen[i] = bits_of_mask(mask + i * present + at, keys);
        any |= block.seen[i];
      }
      if (!any) continue;
      met = true;
      body(at, keys);
    }
    return met;
  }

  // The weights of `count` rows from `row` on in place of their scores.
  ANYBIT_INLINE void weigh_rows(const Block& block, float* scores, int64_t row, int count) const {
    for (int64_t r = row; r < row + count; ++r)
      block.factor[r] = weigh<T>(scores + r * kKeys, block.seen[r / groups], s, block.span.top[r],
                                 block.span.total[r]);
  }

  ANYBIT_INLINE bool meet_many(const Block& block, const Meeting& m) const {
    const int64_t rows = m.positions * groups;
    return for_keys(block, m, [&](int64_t at, int keys) {
      load_rows(key_cache(), m.head, at, keys, block.rows,
                next_rows(key_cache(), m.head, at + kKeys));
      turn(block.rows, width, block.turned);
      load_rows(value_cache(), m.head, at, keys, block.values,
                next_rows(value_cache(), m.head, at + kKeys));
      // All scores first, so that the keys stay near, then all sums, so that the values do.
      for_tiles<kTileRows>(block, rows, [&](int64_t row, int count) {
        const float* query = block.query + row * width;
        with_count<kTileRows>(count,
                              ScoreCall{query, block.turned, width, block.scores + row * kKeys});
        weigh_rows(block, block.scores, row, count);
      });
      for_tiles<kTileRows>(block, rows, [&](int64_t row, int count) {
        const ValueCall<float, false> call{
            block.scores + row * kKeys,       block.values, kKeys, block.factor + row, width,
            block.span.context + row * width, NextRows{}};
        with_count<kTileRows>(count, call);
      });
    });
  }

  // Reading is what takes time: all keys, then all values, each in the order of memory and while
  // others are computed with.
  ANYBIT_INLINE bool meet_few(const Block& block, const Meeting& m) const {
    const int rows = int(m.positions * groups);
    const auto scores_at = [&](int64_t at) { return block.scores + (at - m.first) * rows; };
    // body(all, row, count, next): rows of a cache, and a tile of the queries' rows
    const auto for_rows = [&](const Cache& cache, int64_t at, int keys, NextRows next,
                              const auto& body) {
      const auto tiles = [&](const auto* all) {
        for_tiles<kFewTile>(block, rows, [&](int64_t row, int count) {
          body(all, row, count, next);
          next = {};
        });
      };
      if (kLoadsFast<T> && !s.low_bits() && width == s.head_dim)
        return tiles(reinterpret_cast<const T*>(row_at(cache, m.head, at)));
      load_rows(cache, m.head, at, keys, block.rows, NextRows{});
      tiles(static_cast<const float*>(block.rows));
    };
    int64_t first_seen = -1;
    const bool met = for_keys(block, m, [&](int64_t at, int keys) {
      if (first_seen < 0) next_rows(key_cache(), m.head, first_seen = at).fetch_all();
      const NextRows next = at + kKeys < m.last ? next_rows(key_cache(), m.head, at + kKeys)
                                                : next_rows(value_cache(), m.head, first_seen);
      const auto body = [&](const auto* all, int64_t row, int count, const NextRows& fetched) {
        using E = std::decay_t<decltype(*all)>;
        const FewScoreCall<E> call{block.query + row * width,   all,    width, keys,
                                   scores_at(at) + row * kKeys, fetched};
        with_count<kFewTile>(count, call);
      };
      for_rows(key_cache(), at, keys, next, body);
    });
    return met && for_keys(block, m, [&](int64_t at, int keys) {
             const Cache wanted = at + kKeys < m.last ? value_cache() : key_cache();
             const auto body = [&](const auto* all, int64_t row, int count,
                                   const NextRows& fetched) {
               using E = std::decay_t<decltype(*all)>;
               weigh_rows(block, scores_at(at), row, count);
               const ValueCall<E, true> call{
                   scores_at(at) + row * kKeys,      all,    keys, block.factor + row, width,
                   block.span.context + row * width, fetched};
               with_count<kFewTile>(count, call);
             };
             for_rows(value_cache(), at, keys, next_rows(wanted, m.head, at + kKeys), body);
           });
  }

  ANYBIT_INLINE void write(const RowSums& sums, int64_t head, int64_t position,
                           int64_t rows) const {
    const int64_t sequence = head / s.kv_heads, first = head % s.kv_heads * groups;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t token = sequence * s.tokens + position + row / groups;
      T* to = static_cast<T*>(b.context) + (token * s.heads + first + row % groups) * s.head_dim;
      alignas(64) float part[64];
      for (int64_t d = 0; d < s.head_dim; d += 64) {
        const int count = int(smaller<int64_t>(64, s.head_dim - d));
        for (int i = 0; i < count; ++i)
          part[i] = sums.context[row * width + d + i] / sums.total[row];
        store_saturated(part, count, to + d);
      }
    }
  }
};

template <class T>
inline int attend_with(const AttentionShape& s, const AttentionBuffers& b,
                       const Parallel& parallel) {
  const Attention<T> op(s, b);
  const int64_t heads = int64_t{s.batch} * s.kv_heads;
  const auto each = [&](int64_t count, int64_t work, const auto& body) {
    if (work >= kInline) return parallel(size_t(count), body);
    for (int64_t i = 0; i < count; ++i) body(size_t(i));
  };
  const bool copies = b.past_key != b.present_key || b.past_value != b.present_value;
  each(2 * heads, 2 * heads * (s.tokens + (copies ? s.past : 0)) * s.head_dim, [&](size_t task) {
    const int64_t head = int64_t(task) / 2;
    op.take_in(head, task % 2 == 0 ? op.key_cache() : op.value_cache());
  });
  if (!s.tokens) return 0;

  // A task is a block of positions, or, where there are few rows, a span of their keys.
  const int64_t most = smaller<int64_t>(64, kRows / op.groups > 8 ? kRows / op.groups : 8);
  const int64_t positions = smaller<int64_t>(most, s.tokens);
  const int64_t rows = positions * op.groups, blocks = (s.tokens + positions - 1) / positions;
  int64_t longest = 0;  // of the sequences: rows
  for (int64_t i = 0; i < s.batch; ++i) longest = op.filled(i) > longest ? op.filled(i) : longest;
  const int64_t spans = (longest + kSpan - 1) / kSpan;
  const bool split = blocks == 1 && rows <= 16 && spans > 1;
  const int64_t tasks = split ? spans : blocks;
  const int64_t part_floats = RowSums::floats(op.width, rows);
  float* parts = nullptr;
  if (split) {
    const size_t floats = size_t((heads * spans + 1) * part_floats);
    parts = static_cast<float*>(thread_memory(kPartMemory, sizeof(float) * floats));
    if (!parts) return kNoMemory;
  }
  const auto part = [&](int64_t i) { return RowSums(parts + i * part_floats, op.width, rows); };
  int failed = 0;
  const int64_t work = heads * s.tokens * op.groups * longest * s.head_dim;
  each(heads * tasks, work, [&](size_t task) {
    const int64_t head = int64_t(task) / tasks, filled = op.filled(head / s.kv_heads);
    const int64_t position = split ? 0 : int64_t(task) % tasks * positions;
    const int64_t count = smaller(positions, s.tokens - position);
    void* memory = thread_memory(kBlockMemory, size_t(Block::bytes(op.width, rows)));
    if (!memory) return __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
    Block block(memory, op.width, rows);
    op.load_queries(head, position, count, block.query);
    const auto meet = [&](int64_t first) {
      return op.meet(block, {head, position, count, first, smaller(first + kSpan, filled)});
    };
    if (split) {
      block.span = part(int64_t(task));
      meet(int64_t(task) % spans * kSpan);
      return;
    }
    block.sums.clear(op.width, count * op.groups);
    for (int64_t first = 0; first < filled; first += kSpan) {
      if (meet(first)) join(block.sums, block.span, op.width, count * op.groups);
    }
    op.write(block.sums, head, position, count * op.groups);
  });
  if (failed) return kNoMemory;
  for (int64_t head = 0; split && head < heads; ++head) {
    const RowSums sums = part(heads * spans);
    sums.clear(op.width, rows);
    for (int64_t i = 0; i < spans; ++i) join(sums, part(head * spans + i), op.width, rows);
    op.write(sums, head, 0, rows);
  }
  return 0;
}

inline int attend(const AttentionShape& s, const AttentionBuffers& b, const Parallel& parallel) {
  int result = 0;
  with_dtype(s.dtype, [&](auto t) { result = attend_with<decltype(t)>(s, b, parallel); });
  return result;
}

}  // namespace ANYBIT_SET
}  // namespace anybit::cpu
