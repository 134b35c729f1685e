// fp16, bf16 and fp32 of the activations. Compiled once for each instruction set, in a namespace of
// that name.
//
// A file that compiles kernels for a set defines ANYBIT_SET before it includes this one. Only
// functions of that namespace may be used in it: an inline function of a standard header would be
// merged with the one of another file, and its wide instructions run on a machine without them.
#pragma once
#include <cstdint>
#include <cstring>

#include "core/host/params.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

#if defined(_MSC_VER)
#error "got a compiler without GCC's attributes, expected GCC or Clang"
#endif
#define ANYBIT_INLINE inline __attribute__((always_inline))

namespace anybit::cpu {
namespace ANYBIT_SET {

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

// Calls f with a value of the C++ type that `dtype` names.
template <class F>
ANYBIT_INLINE void with_dtype(int32_t dtype, const F& f) {
  if (dtype == kFloat16) return f(Half{});
  if (dtype == kBFloat16) return f(BFloat{});
  f(float{});
}

ANYBIT_INLINE uint32_t bits_of(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}

ANYBIT_INLINE float float_of_bits(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

template <class T>
ANYBIT_INLINE constexpr T smaller(T a, T b) {
  return a < b ? a : b;
}

ANYBIT_INLINE float float_from(float v) { return v; }
ANYBIT_INLINE float float_from(BFloat v) { return float_of_bits(uint32_t{v.bits} << 16); }
ANYBIT_INLINE float float_from(Half v) {
  const uint32_t sign = uint32_t(v.bits & 0x8000) << 16, magnitude = v.bits & 0x7fff;
  // Exponents are moved from bias 15 to 127 by a multiplication, which takes subnormals along.
  const float finite = float_of_bits(magnitude << 13) * 0x1p112f;
  const uint32_t bits = magnitude >= 0x7c00 ? magnitude << 13 | 0x7f800000 : bits_of(finite);
  return float_of_bits(bits | sign);
}

// Rounded to nearest, half to even; beyond the largest number infinity; NaN stays.
ANYBIT_INLINE void round_to(float v, float& to) { to = v; }
ANYBIT_INLINE void round_to(float v, BFloat& to) {
  const uint32_t bits = bits_of(v);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  to.bits = uint16_t(v != v ? bits >> 16 | 0x40 : rounded);
}
ANYBIT_INLINE void round_to(float v, Half& to) {
  const uint32_t sign = bits_of(v) >> 16 & 0x8000, bits = bits_of(v) & 0x7fffffff;
  // Subnormal results are multiples of 2^-24: the sum with 2^-1, whose last bit is 2^-24, rounds.
  const uint32_t subnormal = bits_of(float_of_bits(bits) + 0.5f) - bits_of(0.5f);
  const uint32_t normal = (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13;
  const uint32_t finite = bits < 0x38800000 ? subnormal : smaller<uint32_t>(normal, 0x7c00);
  to.bits = uint16_t(sign | (bits > 0x7f800000 ? 0x7e00 : bits >= 0x47800000 ? 0x7c00 : finite));
}

template <class T>
constexpr float kLargest = 3.402823466e38f;
template <>
constexpr float kLargest<Half> = 65504.0f;
template <>
constexpr float kLargest<BFloat> = 3.38953139e38f;

// A finite overflow and an infinity become the largest finite number; NaN stays. fp32 stays as it
// is.
template <class T>
ANYBIT_INLINE T saturated(float v) {
  T rounded;
  round_to(v > kLargest<T> ? kLargest<T> : v < -kLargest<T> ? -kLargest<T> : v, rounded);
  return rounded;
}
template <>
ANYBIT_INLINE float saturated<float>(float v) {
  return v;
}

// As many numbers as a register has.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
using FloatVector = __m512;
ANYBIT_INLINE FloatVector load_vector(const float* v) { return _mm512_loadu_ps(v); }
ANYBIT_INLINE void store_vector(float* to, FloatVector v) { _mm512_storeu_ps(to, v); }
ANYBIT_INLINE FloatVector broadcast(float v) { return _mm512_set1_ps(v); }
ANYBIT_INLINE FloatVector multiply_add(FloatVector a, FloatVector b, FloatVector sum) {
  return _mm512_fmadd_ps(a, b, sum);
}
ANYBIT_INLINE FloatVector sum_of(FloatVector a, FloatVector b) { return _mm512_add_ps(a, b); }
ANYBIT_INLINE FloatVector difference(FloatVector a, FloatVector b) { return _mm512_sub_ps(a, b); }
ANYBIT_INLINE FloatVector lesser(FloatVector a, FloatVector b) { return _mm512_min_ps(a, b); }
ANYBIT_INLINE FloatVector greater(FloatVector a, FloatVector b) { return _mm512_max_ps(a, b); }
#elif defined(__AVX2__)
constexpr int kLanes = 8;
using FloatVector = __m256;
ANYBIT_INLINE FloatVector load_vector(const float* v) { return _mm256_loadu_ps(v); }
ANYBIT_INLINE void store_vector(float* to, FloatVector v) { _mm256_storeu_ps(to, v); }
ANYBIT_INLINE FloatVector broadcast(float v) { return _mm256_set1_ps(v); }
ANYBIT_INLINE FloatVector multiply_add(FloatVector a, FloatVector b, FloatVector sum) {
  return _mm256_fmadd_ps(a, b, sum);
}
ANYBIT_INLINE FloatVector sum_of(FloatVector a, FloatVector b) { return _mm256_add_ps(a, b); }
ANYBIT_INLINE FloatVector difference(FloatVector a, FloatVector b) { return _mm256_sub_ps(a, b); }
ANYBIT_INLINE FloatVector lesser(FloatVector a, FloatVector b) { return _mm256_min_ps(a, b); }
ANYBIT_INLINE FloatVector greater(FloatVector a, FloatVector b) { return _mm256_max_ps(a, b); }
#elif defined(__ARM_FEATURE_DOTPROD)
constexpr int kLanes = 4;
using FloatVector = float32x4_t;
ANYBIT_INLINE FloatVector load_vector(const float* v) { return vld1q_f32(v); }
ANYBIT_INLINE void store_vector(float* to, FloatVector v) { vst1q_f32(to, v); }
ANYBIT_INLINE FloatVector broadcast(float v) { return vdupq_n_f32(v); }
ANYBIT_INLINE FloatVector multiply_add(FloatVector a, FloatVector b, FloatVector sum) {
  return vfmaq_f32(sum, a, b);
}
ANYBIT_INLINE FloatVector sum_of(FloatVector a, FloatVector b) { return vaddq_f32(a, b); }
ANYBIT_INLINE FloatVector difference(FloatVector a, FloatVector b) { return vsubq_f32(a, b); }
// b where one of them is NaN
ANYBIT_INLINE FloatVector lesser(FloatVector a, FloatVector b) {
  return vbslq_f32(vcltq_f32(a, b), a, b);
}
ANYBIT_INLINE FloatVector greater(FloatVector a, FloatVector b) {
  return vbslq_f32(vcgtq_f32(a, b), a, b);
}
#else
constexpr int kLanes = 1;
using FloatVector = float;
ANYBIT_INLINE FloatVector load_vector(const float* v) { return *v; }
ANYBIT_INLINE void store_vector(float* to, FloatVector v) { *to = v; }
ANYBIT_INLINE FloatVector broadcast(float v) { return v; }
ANYBIT_INLINE FloatVector multiply_add(FloatVector a, FloatVector b, FloatVector sum) {
  return a * b + sum;
}
ANYBIT_INLINE FloatVector sum_of(FloatVector a, FloatVector b) { return a + b; }
ANYBIT_INLINE FloatVector difference(FloatVector a, FloatVector b) { return a - b; }
// b where one of them is NaN
ANYBIT_INLINE FloatVector lesser(FloatVector a, FloatVector b) { return a < b ? a : b; }
ANYBIT_INLINE FloatVector greater(FloatVector a, FloatVector b) { return a > b ? a : b; }
#endif

#if defined(__AVX512F__)
// Sixteen at a time, which stay in one register: numbers that are written in halves are slow to read as
// a whole.

// The first `count` of 16 lanes, for any count.
ANYBIT_INLINE __mmask16 lanes_below(int count) {
  return count >= 16 ? 0xffff : __mmask16(count > 0 ? (1 << count) - 1 : 0);
}

// Calls f(i, mask) for every register of `count` numbers: from i on the lanes of `mask`.
template <class F>
ANYBIT_INLINE void for_lanes(int count, const F& f) {
  int i = 0;
  for (; i <= count - kLanes; i += kLanes) f(i, __mmask16{0xffff});  // which asks for no mask
  if (i < count) f(i, lanes_below(count - i));
}

// Four times 16 whole numbers as bytes, in their order; beyond int8 the nearest.
ANYBIT_INLINE __m512i bytes_from(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i packed = _mm512_packs_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
  // packing leaves 4 bytes of each vector side by side in a lane
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(order, packed);
}

// Elements of the lanes of `mask`, and 0.
ANYBIT_INLINE FloatVector load_lanes(const Half* x, __mmask16 mask) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, x));
}
ANYBIT_INLINE FloatVector load_lanes(const BFloat* x, __mmask16 mask) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
ANYBIT_INLINE FloatVector load_lanes(const float* x, __mmask16 mask) {
  return _mm512_maskz_loadu_ps(mask, x);
}

// The lower or upper eight.
ANYBIT_INLINE __m512d doubles(FloatVector v, int part) {
  return _mm512_cvtps_pd(part == 0 ? _mm512_castps512_ps256(v) : _mm512_extractf32x8_ps(v, 1));
}

// v rounded to T, in the upper bits as round_to() does it.
ANYBIT_INLINE __m512i bfloat_bits(FloatVector v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  return _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), quiet);
}

// v rounded to T and back.
template <class T>
ANYBIT_INLINE FloatVector round_vector(FloatVector v);
template <>
ANYBIT_INLINE FloatVector round_vector<Half>(FloatVector v) {
  return _mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
template <>
ANYBIT_INLINE FloatVector round_vector<BFloat>(FloatVector v) {
  return _mm512_castsi512_ps(_mm512_and_si512(bfloat_bits(v), _mm512_set1_epi32(~0xffff)));
}
template <>
ANYBIT_INLINE FloatVector round_vector<float>(FloatVector v) {
  return v;
}

// Writes the lanes of `mask`, rounded to T.
ANYBIT_INLINE void store_lanes(Half* to, __mmask16 mask, FloatVector v) {
  _mm256_mask_storeu_epi16(to, mask, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
ANYBIT_INLINE void store_lanes(BFloat* to, __mmask16 mask, FloatVector v) {
  _mm256_mask_storeu_epi16(to, mask, _mm512_cvtepi32_epi16(_mm512_srli_epi32(bfloat_bits(v), 16)));
}
ANYBIT_INLINE void store_lanes(float* to, __mmask16 mask, FloatVector v) {
  _mm512_mask_storeu_ps(to, mask, v);
}

// to[i] = x[i], for any count.
template <class T>
ANYBIT_INLINE void load_floats(const T* x, int count, float* to) {
  for_lanes(count,
            [&](int i, __mmask16 mask) { store_lanes(to + i, mask, load_lanes(x + i, mask)); });
}

// v[i] rounded to T and back.
template <class T>
ANYBIT_INLINE void round_floats(float* v, int count) {
  for_lanes(count, [&](int i, __mmask16 mask) {
    store_lanes(v + i, mask, round_vector<T>(load_lanes(v + i, mask)));
  });
}

// to[i] = v[i] rounded to T, which overflows to infinity.
template <class T>
ANYBIT_INLINE void store_rounded(const float* v, int count, T* to) {
  for_lanes(count,
            [&](int i, __mmask16 mask) { store_lanes(to + i, mask, load_lanes(v + i, mask)); });
}

template <class T>
ANYBIT_INLINE void store_saturated(const float* v, int count, T* to) {
  const FloatVector most = broadcast(kLargest<T>), least = broadcast(-kLargest<T>);
  for_lanes(count, [&](int i, __mmask16 mask) {
    // of a number and a NaN the second
    const FloatVector limited = lesser(most, greater(least, load_lanes(v + i, mask)));
    store_lanes(to + i, mask, limited);
  });
}
template <>
ANYBIT_INLINE void store_saturated(const float* v, int count, float* to) {
  std::memcpy(to, v, sizeof(float) * size_t(count));
}
#else
// to[i] = x[i], for any count.
template <class T>
ANYBIT_INLINE void load_floats(const T* x, int count, float* to) {
  for (int i = 0; i < count; ++i) to[i] = float_from(x[i]);
}

// v[i] rounded to T and back.
template <class T>
ANYBIT_INLINE void round_floats(float* v, int count) {
  for (int i = 0; i < count; ++i) {
    T rounded;
    round_to(v[i], rounded);
    v[i] = float_from(rounded);
  }
}

// to[i] = v[i] rounded to T, which overflows to infinity.
template <class T>
ANYBIT_INLINE void store_rounded(const float* v, int count, T* to) {
  for (int i = 0; i < count; ++i) round_to(v[i], to[i]);
}

template <class T>
ANYBIT_INLINE void store_saturated(const float* v, int count, T* to) {
  for (int i = 0; i < count; ++i) to[i] = saturated<T>(v[i]);
}

#if defined(__F16C__)
// The processor's own conversions, eight at a time; the rest one by one.
template <>
ANYBIT_INLINE void load_floats(const Half* x, int count, float* to) {
  int i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(halves));
  }
  for (; i < count; ++i) to[i] = float_from(x[i]);
}

ANYBIT_INLINE __m128i halves_of(const float* v) {
  return _mm256_cvtps_ph(_mm256_loadu_ps(v), _MM_FROUND_TO_NEAREST_INT);
}

template <>
ANYBIT_INLINE void round_floats<Half>(float* v, int count) {
  int i = 0;
  for (; i + 8 <= count; i += 8) _mm256_storeu_ps(v + i, _mm256_cvtph_ps(halves_of(v + i)));
  for (; i < count; ++i) {
    Half rounded;
    round_to(v[i], rounded);
    v[i] = float_from(rounded);
  }
}

template <>
ANYBIT_INLINE void store_rounded(const float* v, int count, Half* to) {
  int i = 0;
  for (; i + 8 <= count; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), halves_of(v + i));
  for (; i < count; ++i) round_to(v[i], to[i]);
}

template <>
ANYBIT_INLINE void store_saturated(const float* v, int count, Half* to) {
  const __m256 most = _mm256_set1_ps(kLargest<Half>), least = _mm256_set1_ps(-kLargest<Half>);
  int i = 0;
  for (; i + 8 <= count; i += 8) {
    // of a number and a NaN the second
    const __m256 each = _mm256_min_ps(most, _mm256_max_ps(least, _mm256_loadu_ps(v + i)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(each, _MM_FROUND_TO_NEAREST_INT));
  }
  for (; i < count; ++i) to[i] = saturated<Half>(v[i]);
}
#endif
#endif

// v rounded to a whole number, half to even, for |v| < 2^22: the sum with 1.5 * 2^23 has no bits
// behind the point.
constexpr float kNoFraction = 12582912.0f;
ANYBIT_INLINE float rounded(float v) { return (v + kNoFraction) - kNoFraction; }

// v as a whole number, rounded so, for |v| < 2^31.
ANYBIT_INLINE int32_t whole_from(float v) {
  const int32_t high = int32_t(v * 0x1p-10f) * 1024;  // the rest is exact
  return high + int32_t(rounded(v - float(high)));
}

}  // namespace ANYBIT_SET
}  // namespace anybit::cpu
