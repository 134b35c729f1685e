// Rows of activations in registers, a thread holding words of 32 elements: every group of a row
// starts a new word, pads are 0.
#pragma once
#include "core/device/numeric.cuh"

namespace anybit {

__device__ inline uint32_t bits_of(float v) { return __float_as_uint(v); }
__device__ inline uint32_t bits_of(__half v) { return __half_as_ushort(v); }
__device__ inline uint32_t bits_of(__nv_bfloat16 v) { return __bfloat16_as_ushort(v); }
// v as T. Overflow is an infinity, as in the graph's own operators.
template <class T>
__device__ T rounded_to(float v) {
  if constexpr (std::is_same<T, __half>::value) return __float2half_rn(v);
  else if constexpr (sizeof(T) == 2) return __float2bfloat16_rn(v);
  else return v;
}

// Values of a row, kRegs registers of them.
template <class T, int kRegs_>
struct Values {
  static constexpr int kRegs = kRegs_, kCount = kRegs * 4 / sizeof(T);
  uint32_t raw[kRegs];

  template <class F>
  __device__ void set(F value) {  // to the T values value(0), ..., value(kCount - 1)
    ANYBIT_UNROLL
    for (int i = 0; i < kRegs; ++i) {
      if constexpr (sizeof(T) == 4) raw[i] = bits_of(value(i));
      else raw[i] = bits_of(value(2 * i)) | bits_of(value(2 * i + 1)) << 16;
    }
  }
  __device__ uint32_t bits(int i) const {
    if constexpr (sizeof(T) == 4) return raw[i];
    else return raw[i / 2] >> i % 2 * 16 & 0xffff;
  }
  __device__ float operator[](int i) const {
    if constexpr (std::is_same<T, __half>::value)
      return __half2float(__ushort_as_half(static_cast<unsigned short>(bits(i))));
    else if constexpr (sizeof(T) == 2) return __uint_as_float(bits(i) << 16);
    else return __uint_as_float(bits(i));
  }
};
template <class T>
using Part = Values<T, 4>;  // 16 bytes
template <class T>
struct Word {  // 32 elements
  static constexpr int kParts = 2 * sizeof(T), kPartCount = Part<T>::kCount;
  Part<T> part[kParts];

  __device__ uint32_t bits(int i) const { return part[i / kPartCount].bits(i % kPartCount); }
  __device__ float operator[](int i) const { return part[i / kPartCount][i % kPartCount]; }
};

// How a row is cut into words.
struct RowShape {
  int n_groups, group_len, group_words;
};

// Which elements of a row a word holds; the rest of it are pads.
struct Span {
  int first, count;
};
__device__ inline Span span_of(const RowShape& row, int word) {
  const int group = word / row.group_words, begin = (word - group * row.group_words) * 32;
  if (group >= row.n_groups) return {0, 0};
  return {group * row.group_len + begin, row.group_len - begin < 32 ? row.group_len - begin : 32};
}

// f(i, part i of the word at `span` of `row`) for all its parts; pads are 0.
template <bool kVectors, class T, class F>
__device__ void for_each_part(const T* row, Span span, F f) {
  ANYBIT_UNROLL
  for (int i = 0; i < Word<T>::kParts; ++i) {
    Part<T> part = {};
    const int first = i * part.kCount;
    if constexpr (!kVectors) {
      part.set([&](int j) {
        return first + j < span.count ? row[span.first + first + j] : rounded_to<T>(0.0f);
      });
    } else if (first < span.count) {
      const uint4 from = *reinterpret_cast<const uint4*>(row + span.first + first);
      part = {{from.x, from.y, from.z, from.w}};
    }
    f(i, part);
  }
}
template <class T, class F>
__device__ void for_each_part(const T* row, Span span, bool vectors, F f) {
  if (vectors) for_each_part<true>(row, span, f);
  else for_each_part<false>(row, span, f);
}

template <class T>
__device__ void store_word(T* row, Span span, bool vectors, const Word<T>& w) {
  ANYBIT_UNROLL
  for (int i = 0; i < Word<T>::kParts; ++i) {
    const Part<T>& part = w.part[i];
    const int first = i * part.kCount;
    if (!vectors) {
      ANYBIT_UNROLL
      for (int j = 0; j < part.kCount; ++j)
        // already a T
        if (first + j < span.count) row[span.first + first + j] = rounded_to<T>(part[j]);
    } else if (first < span.count) {
      *reinterpret_cast<uint4*>(row + span.first + first) = {part.raw[0], part.raw[1], part.raw[2],
                                                             part.raw[3]};
    }
  }
}

// Widens the range -ends[0] .. ends[1] to hold the word; NaN if it holds one.
template <class T>
__device__ void widen(float (&ends)[2], const Word<T>& w) {
  const auto add = [&](float low, float high) {
    ends[0] = max_nan(ends[0], -low), ends[1] = max_nan(ends[1], high);
  };
  if constexpr (sizeof(T) == 4) {
    ANYBIT_UNROLL
    for (int i = 0; i < 32; ++i) add(w[i], w[i]);
  } else {
    Values<T, 1> low = {}, high = {};  // two columns of values at a time
    ANYBIT_UNROLL
    for (const Part<T>& part : w.part) {
      ANYBIT_UNROLL
      for (uint32_t pair : part.raw) {
        low.raw[0] = min_or_max_nan2<T, false>(low.raw[0], pair);
        high.raw[0] = min_or_max_nan2<T, true>(high.raw[0], pair);
      }
    }
    add(low[0], high[0]);
    add(low[1], high[1]);
  }
}

}  // namespace anybit
