// Residual sums, activations, norms and rotary positions, row by row, each result rounded where the
// nodes of forms.py round. Compiled once for each instruction set, all of which give the same bits,
// but for the payload of a NaN: loops of plain C++ over blocks that the compiler makes vectors of.
#pragma once
#include <cstring>
#include <type_traits>
#include <vector>

#include "core/cpu/tokens.h"
#include "pointwise/cpu/pointwise.h"

namespace anybit::cpu {
namespace ANYBIT_SET {

constexpr int64_t kShared = 1 << 15;  // numbers: fewer are not worth waking threads for

// body(first, last) for rows first .. last - 1, in as many parts as there is work for.
template <class F>
ANYBIT_INLINE void for_rows(int64_t rows, int64_t width, const Parallel& parallel, const F& body) {
  const int64_t each = width < kShared ? kShared / (width > 0 ? width : 1) : 1;
  const int64_t tasks = (rows + each - 1) / each;
  parallel(size_t(tasks), [&](size_t task) {
    const int64_t first = int64_t(task) * each;
    body(first, smaller(first + each, rows));
  });
}

// body(first, count) for blocks of kElements of a row.
template <class F>
ANYBIT_INLINE void for_blocks(int64_t width, const F& body) {
  for (int64_t first = 0; first < width; first += kElements)
    body(first, int(smaller<int64_t>(kElements, width - first)));
}

// e^x for x of -708 to 708, within a few units in the last place of fp64.
//
// x = n ln 2 + r with |r| < 0.35; the first part of ln 2 has zeros enough at its end for n to be
// multiplied exactly. Then the Taylor series, whose next term is below 2^-57.
ANYBIT_INLINE double exponential64(double x) {
  constexpr double kNoFraction = 0x1.8p52;  // its sum with n has n in its last bits
  const double t = x * 0x1.71547652b82fep+0 + kNoFraction, n = t - kNoFraction;
  const double r = (x - n * 0x1.62e42fee00000p-1) - n * 0x1.a39ef35793c76p-33;
  double y = 1.0 / 6227020800;
  y = y * r + 1.0 / 479001600;
  y = y * r + 1.0 / 39916800;
  y = y * r + 1.0 / 3628800;
  y = y * r + 1.0 / 362880;
  y = y * r + 1.0 / 40320;
  y = y * r + 1.0 / 5040;
  y = y * r + 1.0 / 720;
  y = y * r + 1.0 / 120;
  y = y * r + 1.0 / 24;
  y = y * r + 1.0 / 6;
  y = y * r + 0.5;
  y = (y * r) * r + r + 1.0;
  int64_t bits;
  std::memcpy(&bits, &t, sizeof bits);
  bits = int64_t((uint64_t(bits) << 52) + (uint64_t{1023} << 52));
  double power;
  std::memcpy(&power, &bits, sizeof power);
  return y * power;
}

// e^-|x|, where a NaN may become anything.
ANYBIT_INLINE double falling(double x) {
  const double size = x < 0 ? -x : x;
  return exponential64(-(size < 708 ? size : 708));
}

ANYBIT_INLINE float sigmoid(float x) {
  const double e = falling(double(x)), below = e / (1 + e), above = 1 - below;
  return float(x < 0 ? below : above);  // of two numbers: a choice of what to compute is no vector
}

// x (1 + tanh(inner)) / 2 in fp64. Behind 1 - |tanh| the difference loses what fp64 loses: that is
// part of the definition.
ANYBIT_INLINE float gelu_tanh(float v) {
  constexpr double kRoot = 0.79788456080286535588;  // of 2 / pi
  const double x = double(v), inner = kRoot * (x + 0.044715 * (x * x * x));
  const double e = falling(2 * inner), size = 1 - 2 * e / (1 + e);
  return float(0.5 * x * (1 + (inner < 0 ? -size : size)));
}

template <class T, int32_t kKind>
ANYBIT_INLINE void activate(float* v) {
  alignas(64) float other[kElements];
  if constexpr (kKind == kSilu) {
    for (int i = 0; i < kElements; ++i) other[i] = sigmoid(v[i]);
    round_floats<T>(other, kElements);
    for (int i = 0; i < kElements; ++i) v[i] *= other[i];
  } else if constexpr (kKind == kGeluTanh) {
    for (int i = 0; i < kElements; ++i) v[i] = gelu_tanh(v[i]);
  } else {
    for (int i = 0; i < kElements; ++i) v[i] = v[i] < 0 ? 0.0f : v[i] * v[i];
  }
}

// y = the activation of x, rounded to T.
template <class T, int32_t kKind>
ANYBIT_INLINE void activated(const T* x, int count, float* y) {
  load_floats(x, count, y);
  activate<T, kKind>(y);
  round_floats<T>(y, kElements);
}

// The activation of every 16-bit number: an exponential in fp64 costs more than to look it up.
template <class T, int32_t kKind>
inline const T* table_of_activated() {
  static const std::vector<T> table = [] {
    constexpr int kNumbers = 1 << 16;
    static_assert(sizeof(T) == 2 && kNumbers % kElements == 0);
    std::vector<T> made(kNumbers);
    alignas(64) float y[kElements];
    T x[kElements];
    for (int first = 0; first < kNumbers; first += kElements) {
      for (int i = 0; i < kElements; ++i) {
        const uint16_t bits = uint16_t(first + i);
        std::memcpy(&x[i], &bits, sizeof bits);
      }
      activated<T, kKind>(x, kElements, y);
      store_rounded(y, kElements, made.data() + first);
    }
    return made;
  }();
  return table.data();
}

template <class T>
ANYBIT_INLINE void look_up(const T* table, const T* x, int count, float* y) {
  T found[kElements];
  for (int i = 0; i < count; ++i) {
    uint16_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    found[i] = table[bits];
  }
  load_floats(found, count, y);
}

template <class T, int32_t kKind>
inline void activation_rows(const RowsShape& s, bool gated, const ActivationBuffers& b,
                            int64_t begin, int64_t end) {
  const int64_t width = gated ? 2 * s.width : s.width;
  alignas(64) float v[kElements] = {}, up[kElements] = {};
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(b.x) + row * width;
    T* y = static_cast<T*>(b.y) + row * s.width;
    for_blocks(s.width, [&](int64_t first, int count) {
      if constexpr (sizeof(T) == 2 && kKind != kRelu2)
        look_up(table_of_activated<T, kKind>(), x + first, count, v);
      else activated<T, kKind>(x + first, count, v);
      if (gated) {
        load_floats(x + s.width + first, count, up);
        for (int i = 0; i < kElements; ++i) v[i] *= up[i];
      }
      store_rounded(v, count, y + first);
    });
  }
}

inline void activation(const RowsShape& s, int32_t kind, bool gated, const ActivationBuffers& b,
                       const Parallel& parallel) {
  with_dtype(s.dtype, [&](auto t) {
    using T = decltype(t);
    for_rows(s.rows, 4 * s.width, parallel, [&](int64_t begin, int64_t end) {
      if (kind == kSilu) activation_rows<T, kSilu>(s, gated, b, begin, end);
      else if (kind == kGeluTanh) activation_rows<T, kGeluTanh>(s, gated, b, begin, end);
      else activation_rows<T, kRelu2>(s, gated, b, begin, end);
    });
  });
}

inline void sum(const RowsShape& s, float multiplier, const SumBuffers& b,
                const Parallel& parallel) {
  with_dtype(s.dtype, [&](auto t) {
    using T = decltype(t);
    for_rows(s.rows, s.width, parallel, [&](int64_t begin, int64_t end) {
      const int64_t at = begin * s.width;
      const T* stream = static_cast<const T*>(b.stream) + at;
      const T* value = static_cast<const T*>(b.value) + at;
      T* to = static_cast<T*>(b.sum) + at;
      alignas(64) float v[kElements] = {}, more[kElements] = {};
      for_blocks((end - begin) * s.width, [&](int64_t first, int count) {
        load_floats(stream + first, count, v);
        load_floats(value + first, count, more);
        if (multiplier != 1) {
          for (int i = 0; i < kElements; ++i) more[i] *= multiplier;
          round_floats<T>(more, kElements);
        }
        for (int i = 0; i < kElements; ++i) v[i] += more[i];
        store_rounded(v, count, to + first);
      });
    });
  });
}

inline void norm(const RowsShape& s, float epsilon, const NormBuffers& b,
                 const Parallel& parallel) {
  with_dtype(s.dtype, [&](auto t) {
    using T = decltype(t);
    for_rows(s.rows, 4 * s.width, parallel, [&](int64_t begin, int64_t end) {
      alignas(64) float v[kElements];
      for (int64_t row = begin; row < end; ++row) {
        const T* x = static_cast<const T*>(b.x) + row * s.width;
        T* y = static_cast<T*>(b.y) + row * s.width;
        const NormedToken<T> token(x, static_cast<const T*>(b.gain), s.width, double(epsilon));
        for_blocks(s.width, [&](int64_t first, int count) {
          token.read(first, count, v);
          store_rounded(v, count, y + first);
        });
      }
    });
  });
}

// The heads of one token.
template <class T>
struct HeadsOfToken {
  const HeadsShape& s;
  const HeadsBuffers& b;
  int64_t sequence, place;
  const T *cos, *sin;

  ANYBIT_INLINE HeadsOfToken(const HeadsShape& shape, const HeadsBuffers& buffers, int64_t token)
      : s(shape),
        b(buffers),
        sequence(token / shape.tokens),
        place(token % shape.tokens),
        cos(nullptr),
        sin(nullptr) {
    if (!s.rotary) return;
    const int64_t at = b.position_ids[token] * (s.rotary / 2);
    cos = static_cast<const T*>(b.cos) + at;
    sin = static_cast<const T*>(b.sin) + at;
  }

  // `count` heads of x go to `to` [batch, count, tokens, head_dim], turned.
  ANYBIT_INLINE void turn(const T* x, const void* gain, float epsilon, int64_t count,
                          void* to) const {
    alignas(64) float v[kMostHeadDim + kElements];
    const int64_t width = s.norm == kAllHeads ? count * s.head_dim : int64_t{s.head_dim};
    const T* gains = s.norm == kNoNorm ? nullptr : static_cast<const T*>(gain);
    const auto token_of = [&](int64_t first) {
      return NormedToken<T>(x + first, gains, width, double(epsilon));
    };
    NormedToken<T> token = token_of(0);
    for (int64_t head = 0; head < count; ++head) {
      int64_t first = head * s.head_dim;
      if (s.norm != kAllHeads && head) token = token_of(first);
      if (s.norm != kAllHeads) first = 0;
      for_blocks(s.head_dim, [&](int64_t d, int some) { token.read(first + d, some, v + d); });
      rotate(v);
      store_rounded(v, s.head_dim, head_at(to, head, count));
    }
  }

  // Heads as they are.
  ANYBIT_INLINE void copy(const T* x, int64_t count, void* to) const {
    for (int64_t head = 0; head < count; ++head)
      std::memcpy(head_at(to, head, count), x + head * s.head_dim, sizeof(T) * size_t(s.head_dim));
  }

 private:
  ANYBIT_INLINE T* head_at(void* to, int64_t head, int64_t count) const {
    return static_cast<T*>(to) + ((sequence * count + head) * s.tokens + place) * s.head_dim;
  }

  // Products of two 16-bit numbers are exact in fp32, those of two fp32 numbers in fp64: a sum that
  // fuses one with its addition gives the same bits.
  ANYBIT_INLINE void rotate(float* v) const {
    using Wide = std::conditional_t<sizeof(T) == sizeof(float), double, float>;
    const int half = s.rotary / 2;
    alignas(64) float c[kElements], sn[kElements];
    for_blocks(half, [&](int64_t first, int count) {
      load_floats(cos + first, count, c);
      load_floats(sin + first, count, sn);
      float *low = v + first, *high = v + half + first;
      for (int i = 0; i < count; ++i) {
        const Wide a = low[i], other = high[i], along = c[i], across = sn[i];
        low[i] = float(along * a - across * other);
        high[i] = float(across * a + along * other);
      }
    });
  }
};

inline void heads(const HeadsShape& s, const HeadsBuffers& b, const Parallel& parallel) {
  with_dtype(s.dtype, [&](auto t) {
    using T = decltype(t);
    const int64_t width = (int64_t{s.heads} + 2 * int64_t{s.kv_heads}) * s.head_dim;
    const int64_t tokens = int64_t{s.batch} * s.tokens;
    for_rows(tokens, width, parallel, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const HeadsOfToken<T> token(s, b, i);
        const T* query = static_cast<const T*>(b.qkv) + i * width;
        const T* key = query + int64_t{s.heads} * s.head_dim;
        token.turn(query, b.query_gain, s.query_epsilon, s.heads, b.query);
        token.turn(key, b.key_gain, s.key_epsilon, s.kv_heads, b.key);
        token.copy(key + int64_t{s.kv_heads} * s.head_dim, s.kv_heads, b.value);
      }
    });
  });
}

}  // namespace ANYBIT_SET
}  // namespace anybit::cpu
