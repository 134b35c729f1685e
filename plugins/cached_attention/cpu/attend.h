// Attention with its cache on a CPU: first the cache takes the new rows in, then blocks of queries
// meet blocks of keys and values with a running softmax, all in fp32. Compiled once for each
// instruction set.
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
constexpr int kFewRows = 4;           // of a block: keys are not turned round for so few
constexpr int64_t kSplit = 512;       // keys of a task, where there are few rows
constexpr int64_t kInline = 1 << 17;  // multiplications: fewer are not worth waking threads for

ANYBIT_INLINE int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// c[r][n] = c[r][n] * factor[r] + sum over k of a[r][k] * b[k][n]; no factors: c starts at 0.
struct TileCall {
  const float *a, *b, *factor;
  int64_t a_stride, b_stride, c_stride;
  int depth, columns;  // whole vectors
  float* c;

  template <int kCount>
  ANYBIT_INLINE void operator()() const {
    int n = 0;
    for (; n + kTileVectors * kWide <= columns; n += kTileVectors * kWide)
      part<kCount, kTileVectors>(n);
    for (; n < columns; n += kWide) part<kCount, 1>(n);
  }

  template <int kCount, int kVectors>
  ANYBIT_INLINE void part(int n) const {
    V sums[kCount][kVectors];
    for (int r = 0; r < kCount; ++r) {
      for (int v = 0; v < kVectors; ++v)
        sums[r][v] = factor ? multiply(splat(factor[r]), load(at(r, n, v))) : splat(0.0f);
    }
    for (int k = 0; k < depth; ++k) {
      V row[kVectors];
      for (int v = 0; v < kVectors; ++v) row[v] = load(b + k * b_stride + n + kWide * v);
#pragma GCC unroll 6
      for (int r = 0; r < kCount; ++r) {
        const V x = splat(a[r * a_stride + k]);
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) sums[r][v] = fused(x, row[v], sums[r][v]);
      }
    }
    for (int r = 0; r < kCount; ++r) {
      for (int v = 0; v < kVectors; ++v) store(at(r, n, v), sums[r][v]);
    }
  }

  ANYBIT_INLINE float* at(int r, int n, int v) const { return c + r * c_stride + n + kWide * v; }
};

// turned[d][j] = rows[j][d] of kKeys rows, d below a multiple of 16.
inline void turn(const float* rows, int64_t stride, int width, float* turned) {
#if defined(__AVX2__)
  for (int d = 0; d < width; d += 8) {
    for (int j = 0; j < kKeys; j += 8) {
      __m256 a[8], b[8];
      for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(rows + (j + i) * stride + d);
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
        float* to = turned + (d + i) * kKeys + j;
        _mm256_storeu_ps(to, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
        _mm256_storeu_ps(to + 4 * kKeys, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
      }
    }
  }
#else
  for (int j = 0; j < kKeys; ++j) {
    for (int d = 0; d < width; ++d) turned[d * kKeys + j] = rows[j * stride + d];
  }
#endif
}

// What one thread needs for a block of rows.
struct Block {
  float *rows, *turned, *values;  // keys [kKeys][width], turned [width][kKeys], values as keys
  float *query, *context;         // [rows][width]
  float* scores;                  // [rows][kKeys], then weights
  float *top, *total, *factor;    // [rows]: largest score so far, sum of weights; see weigh()
  uint64_t* seen;                 // [positions]: which keys of the block a position sees

  static constexpr int64_t bytes(int64_t width, int64_t rows) {
    const int64_t floats = 3 * kKeys * width + rows * (2 * width + kKeys) + 3 * (rows + 1);
    return int64_t(sizeof(float)) * floats + int64_t(sizeof(uint64_t)) * rows;
  }
  ANYBIT_INLINE Block(void* memory, int64_t width, int64_t count) {
    float* at = static_cast<float*>(memory);
    const auto take = [&](int64_t floats) {
      float* taken = at;
      at += floats;
      return taken;
    };
    rows = take(kKeys * width);
    turned = take(kKeys * width);
    values = take(kKeys * width);
    query = take(count * width);
    context = take(count * width);
    scores = take(count * kKeys);
    top = take(rounded_up(count, 2));
    total = take(rounded_up(count, 2));
    factor = take(rounded_up(count, 2));
    seen = reinterpret_cast<uint64_t*>(at);
  }
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

  ANYBIT_INLINE void load_rows(const Cache& cache, int64_t head, int64_t first, int count,
                               float* to) const {
    const int64_t at = head * present + first;
    const char* from = static_cast<const char*>(cache.present) + size_t(at) * row_bytes();
    for (int j = 0; j < kKeys; ++j, from += row_bytes(), to += width) {
      const int used = j < count ? s.head_dim : 0;
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

  // Scores of `count` rows against the block's keys.
  ANYBIT_INLINE void score(const Block& block, int64_t first, int count, bool few) const {
    const float* query = block.query + first * width;
    float* scores = block.scores + first * kKeys;
    if (!few) {
      const TileCall call{query, block.turned, nullptr, width, kKeys,
                          kKeys, s.head_dim,   kKeys,   scores};
      return with_count<kTileRows>(count, call);
    }
    for (int j = 0; j < kKeys; ++j) {
      const float* key = block.rows + j * width;
      for (int r = 0; r < count; ++r) {
        V sum = splat(0.0f);
        for (int64_t d = 0; d < width; d += kWide)
          sum = fused(load(query + r * width + d), load(key + d), sum);
        scores[r * kKeys + j] = sum_of(sum);
      }
    }
  }

  // Calls body(first, count) for tiles of rows of which one sees a key of the block.
  template <class F>
  ANYBIT_INLINE void for_tiles(const Block& block, int64_t rows, const F& body) const {
    for (int64_t row = 0; row < rows; row += kTileRows) {
      const int count = int(smaller<int64_t>(kTileRows, rows - row));
      uint64_t any = 0;
      for (int64_t i = row / groups; i <= (row + count - 1) / groups; ++i) any |= block.seen[i];
      if (any) body(row, count);
    }
  }

  // `positions` query positions of a key-value head from `position` on meet keys first .. last; the
  // sums stay in the block.
  inline void meet(const Block& block, int64_t head, int64_t position, int64_t positions,
                   int64_t first, int64_t last) const {
    const int64_t rows = positions * groups, sequence = head / s.kv_heads;
    const bool few = rows <= kFewRows;
    load_queries(head, position, positions, block.query);
    for (int64_t i = 0; i < rows; ++i) {
      block.top[i] = -__builtin_huge_valf();
      block.total[i] = 0;
    }
    std::memset(block.context, 0, sizeof(float) * size_t(rows * width));
    const uint8_t* mask = b.mask + ((s.masks == 1 ? 0 : sequence) * s.tokens + position) * present;
    for (int64_t at = first; at < last; at += kKeys) {
      const int keys = int(smaller<int64_t>(kKeys, last - at));
      uint64_t any = 0;
      for (int64_t i = 0; i < positions; ++i) {
        block.seen[i] = bits_of_mask(mask + i * present + at, keys);
        any |= block.seen[i];
      }
      if (!any) continue;
      load_rows(key_cache(), head, at, keys, block.rows);
      if (!few) turn(block.rows, width, int(width), block.turned);
      load_rows(value_cache(), head, at, keys, block.values);
      // All scores first, so that the keys stay near, then all sums, so that the values do.
      for_tiles(block, rows, [&](int64_t row, int count) {
        score(block, row, count, few);
        for (int64_t r = row; r < row + count; ++r)
          block.factor[r] = weigh<T>(block.scores + r * kKeys, block.seen[r / groups], s,
                                     block.top[r], block.total[r]);
      });
      for_tiles(block, rows, [&](int64_t row, int count) {
        const TileCall call{block.scores + row * kKeys,
                            block.values,
                            block.factor + row,
                            kKeys,
                            width,
                            width,
                            kKeys,
                            int(width),
                            block.context + row * width};
        with_count<kTileRows>(count, call);
      });
    }
  }

  ANYBIT_INLINE void write(const float* context, float total, int64_t head, int64_t position,
                           int64_t group) const {
    const int64_t sequence = head / s.kv_heads, query = head % s.kv_heads * groups + group;
    T* to = static_cast<T*>(b.context) +
            ((sequence * s.tokens + position) * s.heads + query) * s.head_dim;
    alignas(64) float part[64];
    for (int64_t d = 0; d < s.head_dim; d += 64) {
      const int count = int(smaller<int64_t>(64, s.head_dim - d));
      for (int i = 0; i < count; ++i) part[i] = context[d + i] / total;
      store_saturated(part, count, to + d);
    }
  }
};

// Puts the parts of a few rows together: each is weighed by its largest score, over all of them.
template <class T>
inline void join(const Attention<T>& op, const float* partial, int64_t parts, int64_t rows,
                 int64_t heads, float* context) {
  for (int64_t head = 0; head < heads; ++head) {
    for (int64_t row = 0; row < rows; ++row) {
      const auto part = [&](int64_t i) {
        return partial + (head * parts + i) * rows * (op.width + 2);
      };
      const auto top = [&](int64_t i) { return part(i)[rows * op.width + row]; };
      float most = top(0), total = 0;
      for (int64_t i = 1; i < parts; ++i) most = top(i) > most ? top(i) : most;
      const float by = most == -__builtin_huge_valf() ? 0.0f : most;
      std::memset(context, 0, sizeof(float) * size_t(op.width));
      for (int64_t i = 0; i < parts; ++i) {
        alignas(64) float factor[kWide];
        store(factor, exponential(splat(top(i) - by)));
        total += factor[0] * part(i)[rows * (op.width + 1) + row];
        for (int64_t d = 0; d < op.width; ++d)
          context[d] += factor[0] * part(i)[row * op.width + d];
      }
      op.write(context, total, head, row / op.groups, row % op.groups);
    }
  }
}

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

  // Positions of a block, and keys of a task: all, but for a few rows, whose parts are put together
  // at the end.
  const int64_t most = smaller<int64_t>(64, kRows / op.groups > 8 ? kRows / op.groups : 8);
  const int64_t positions = smaller<int64_t>(most, s.tokens);
  const int64_t rows = positions * op.groups, blocks = (s.tokens + positions - 1) / positions;
  const bool split = blocks == 1 && rows <= 16;
  const int64_t span = split ? kSplit : rounded_up(op.present, kKeys);
  const int64_t parts = (op.present + span - 1) / span;
  const int64_t part_floats = rows * (op.width + 2);
  float* partial = nullptr;
  if (parts > 1) {
    const size_t floats = size_t(heads * parts * part_floats + op.width);
    partial = static_cast<float*>(thread_memory(kPartMemory, sizeof(float) * floats));
    if (!partial) return kNoMemory;
  }
  int failed = 0;
  const int64_t work = heads * s.tokens * op.groups * op.present * s.head_dim;
  each(heads * blocks * parts, work, [&](size_t task) {
    const int64_t head = int64_t(task) / (blocks * parts), part = int64_t(task) % parts;
    const int64_t position = int64_t(task) / parts % blocks * positions;
    const int64_t count = smaller(positions, s.tokens - position);
    const int64_t first = part * span;
    const int64_t last = smaller(first + span, op.filled(head / s.kv_heads));
    void* memory = thread_memory(kBlockMemory, size_t(Block::bytes(op.width, rows)));
    if (!memory) return __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
    const Block block(memory, op.width, rows);
    op.meet(block, head, position, count, first, last);
    if (parts == 1) {
      for (int64_t i = 0; i < count * op.groups; ++i)
        op.write(block.context + i * op.width, block.total[i], head, position + i / op.groups,
                 i % op.groups);
      return;
    }
    float* to = partial + int64_t(task) * part_floats;
    std::memcpy(to, block.context, sizeof(float) * size_t(rows * op.width));
    std::memcpy(to + rows * op.width, block.top, sizeof(float) * size_t(rows));
    std::memcpy(to + rows * (op.width + 1), block.total, sizeof(float) * size_t(rows));
  });
  if (failed) return kNoMemory;
  if (parts > 1) join(op, partial, parts, rows, heads, partial + heads * parts * part_floats);
  return 0;
}

inline int attend(const AttentionShape& s, const AttentionBuffers& b, const Parallel& parallel) {
  int result = 0;
  with_dtype(s.dtype, [&](auto t) { result = attend_with<decltype(t)>(s, b, parallel); });
  return result;
}

}  // namespace ANYBIT_SET
}  // namespace anybit::cpu
