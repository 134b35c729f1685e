// Vectors of kWide fp32 numbers for attention, and what it does with them, for each instruction set.
//
// sum_of(a) adds halves to each other: lane i and lane i + kWide / 2, then the sums of those likewise.
#pragma once
#include "core/cpu/floats.h"

namespace anybit::cpu {
namespace ANYBIT_SET {

#if defined(__AVX512F__)

using V = __m512;
constexpr int kWide = 16;
ANYBIT_INLINE V load(const float* v) { return _mm512_loadu_ps(v); }
ANYBIT_INLINE void store(float* to, V v) { _mm512_storeu_ps(to, v); }
ANYBIT_INLINE V splat(float v) { return _mm512_set1_ps(v); }
ANYBIT_INLINE V fused(V a, V b, V sum) { return _mm512_fmadd_ps(a, b, sum); }
ANYBIT_INLINE V add(V a, V b) { return _mm512_add_ps(a, b); }
ANYBIT_INLINE V subtract(V a, V b) { return _mm512_sub_ps(a, b); }
ANYBIT_INLINE V multiply(V a, V b) { return _mm512_mul_ps(a, b); }
ANYBIT_INLINE V divide(V a, V b) { return _mm512_div_ps(a, b); }
// A NaN in b stays.
ANYBIT_INLINE V largest(V a, V b) { return _mm512_max_ps(a, b); }
ANYBIT_INLINE V smallest(V a, V b) { return _mm512_min_ps(a, b); }
ANYBIT_INLINE V magnitude(V a) { return _mm512_abs_ps(a); }
ANYBIT_INLINE V with_sign_of(V a, V sign) {
  return _mm512_or_ps(_mm512_abs_ps(a), _mm512_and_ps(sign, _mm512_set1_ps(-0.0f)));
}
// Lanes of a where the bit is set, else of b.
ANYBIT_INLINE V select(uint32_t bits, V a, V b) {
  return _mm512_mask_blend_ps(__mmask16(bits), b, a);
}
ANYBIT_INLINE V select_less(V x, V y, V a, V b) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, y, _CMP_LT_OQ), b, a);
}
ANYBIT_INLINE V shifted_exponent(V t) {
  const __m512i bits = _mm512_slli_epi32(_mm512_castps_si512(t), 23);
  return _mm512_castsi512_ps(_mm512_add_epi32(bits, _mm512_set1_epi32(127 << 23)));
}
ANYBIT_INLINE float sum_of(V a) {
  __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
// to[i] = sum_of(a[i]), 8 of them: additions are those of sum_of, of two or more vectors together.
constexpr int kSumsTogether = 8;
ANYBIT_INLINE void store_sums(const V* a, float* to) {
  V quarter[2];  // lane L: a quarter of a[2 L + i]
  for (int i = 0; i < 2; ++i) {
    const auto half = [&](int j) {  // of a[j] and a[j + 2]
      return add(_mm512_shuffle_f32x4(a[j], a[j + 2], 0x44),
                 _mm512_shuffle_f32x4(a[j], a[j + 2], 0xee));
    };
    const V x = half(i), y = half(i + 4);
    quarter[i] = add(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));
  }
  const V pairs = add(_mm512_shuffle_ps(quarter[0], quarter[1], 0x44),
                      _mm512_shuffle_ps(quarter[0], quarter[1], 0xee));
  const V twice = add(pairs, _mm512_permute_ps(pairs, 0xb1));
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 0, 2, 4, 6, 8, 10, 12, 14);
  _mm256_storeu_ps(to, _mm512_castps512_ps256(_mm512_permutexvar_ps(even, twice)));
}
ANYBIT_INLINE float largest_of(V a) { return _mm512_reduce_max_ps(a); }
ANYBIT_INLINE uint64_t bits_of_mask(const uint8_t* mask, int count) {
  const uint64_t lanes = count < 64 ? (uint64_t{1} << count) - 1 : ~uint64_t{0};
  const __m512i bytes = _mm512_maskz_loadu_epi8(lanes, mask);
  return _mm512_test_epi8_mask(bytes, bytes);
}

#elif defined(__AVX2__)

using V = __m256;
constexpr int kWide = 8;
ANYBIT_INLINE V load(const float* v) { return _mm256_loadu_ps(v); }
ANYBIT_INLINE void store(float* to, V v) { _mm256_storeu_ps(to, v); }
ANYBIT_INLINE V splat(float v) { return _mm256_set1_ps(v); }
ANYBIT_INLINE V fused(V a, V b, V sum) { return _mm256_fmadd_ps(a, b, sum); }
ANYBIT_INLINE V add(V a, V b) { return _mm256_add_ps(a, b); }
ANYBIT_INLINE V subtract(V a, V b) { return _mm256_sub_ps(a, b); }
ANYBIT_INLINE V multiply(V a, V b) { return _mm256_mul_ps(a, b); }
ANYBIT_INLINE V divide(V a, V b) { return _mm256_div_ps(a, b); }
ANYBIT_INLINE V largest(V a, V b) { return _mm256_max_ps(a, b); }
ANYBIT_INLINE V smallest(V a, V b) { return _mm256_min_ps(a, b); }
ANYBIT_INLINE V magnitude(V a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
ANYBIT_INLINE V with_sign_of(V a, V sign) {
  return _mm256_or_ps(magnitude(a), _mm256_and_ps(sign, _mm256_set1_ps(-0.0f)));
}
ANYBIT_INLINE V select(uint32_t bits, V a, V b) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_and_si256(_mm256_set1_epi32(int(bits)), lane);
  return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane)));
}
ANYBIT_INLINE V select_less(V x, V y, V a, V b) {
  return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, y, _CMP_LT_OQ));
}
ANYBIT_INLINE V shifted_exponent(V t) {
  const __m256i bits = _mm256_slli_epi32(_mm256_castps_si256(t), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(bits, _mm256_set1_epi32(127 << 23)));
}
ANYBIT_INLINE float sum_of(V a) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
ANYBIT_INLINE float largest_of(V a) {
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
ANYBIT_INLINE uint64_t bits_of_mask(const uint8_t* mask, int count) {
  alignas(32) uint8_t bytes[64] = {};
  std::memcpy(bytes, mask, size_t(count));
  const __m256i zero = _mm256_setzero_si256();
  const __m256i* halves = reinterpret_cast<const __m256i*>(bytes);
  const auto empty = [&](int i) {
    return uint32_t(_mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_load_si256(halves + i), zero)));
  };
  return ~(uint64_t{empty(1)} << 32 | empty(0));
}

#else

// The compiler's own vectors, for any machine.
typedef float V __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(16)));
constexpr int kWide = 4;
ANYBIT_INLINE V load(const float* v) {
  V loaded;
  std::memcpy(&loaded, v, sizeof loaded);
  return loaded;
}
ANYBIT_INLINE void store(float* to, V v) { std::memcpy(to, &v, sizeof v); }
ANYBIT_INLINE V splat(float v) { return V{v, v, v, v}; }
ANYBIT_INLINE V fused(V a, V b, V sum) { return a * b + sum; }
ANYBIT_INLINE V add(V a, V b) { return a + b; }
ANYBIT_INLINE V subtract(V a, V b) { return a - b; }
ANYBIT_INLINE V multiply(V a, V b) { return a * b; }
ANYBIT_INLINE V divide(V a, V b) { return a / b; }
ANYBIT_INLINE V chosen(Words lanes, V a, V b) {
  return V((Words(a) & lanes) | (Words(b) & ~lanes));
}
ANYBIT_INLINE V largest(V a, V b) { return chosen(Words(a > b), a, b); }
ANYBIT_INLINE V smallest(V a, V b) { return chosen(Words(a < b), a, b); }
ANYBIT_INLINE V magnitude(V a) { return V(Words(a) & 0x7fffffff); }
ANYBIT_INLINE V with_sign_of(V a, V sign) {
  return V((Words(a) & 0x7fffffff) | (Words(sign) & 0x80000000));
}
ANYBIT_INLINE V select(uint32_t bits, V a, V b) {
  return chosen(Words((Words{bits, bits, bits, bits} & Words{1, 2, 4, 8}) != 0), a, b);
}
ANYBIT_INLINE V select_less(V x, V y, V a, V b) { return chosen(Words(x < y), a, b); }
ANYBIT_INLINE V shifted_exponent(V t) { return V((Words(t) << 23) + (127u << 23)); }
ANYBIT_INLINE float sum_of(V a) { return (a[0] + a[2]) + (a[1] + a[3]); }
ANYBIT_INLINE float largest_of(V a) {
  const float low = a[0] > a[1] ? a[0] : a[1], high = a[2] > a[3] ? a[2] : a[3];
  return low > high ? low : high;
}
ANYBIT_INLINE uint64_t bits_of_mask(const uint8_t* mask, int count) {
  uint64_t bits = 0;
  for (int i = 0; i < count; ++i) bits |= uint64_t{mask[i] != 0} << i;
  return bits;
}

#endif

#if defined(__AVX512F__)
template <class T>
ANYBIT_INLINE V load(const T* v) {
  return load_lanes(v, 0xffff);
}
#else
constexpr int kSumsTogether = 2;  // with four rows there are no registers for more
ANYBIT_INLINE void store_sums(const V* a, float* to) {
  for (int i = 0; i < kSumsTogether; ++i) to[i] = sum_of(a[i]);
}
template <class T>
ANYBIT_INLINE V load(const T* v) {
  alignas(64) float wide[kWide];
  load_floats(v, kWide, wide);
  return load(static_cast<const float*>(wide));
}
#endif

// Whether load() of T costs little, so that numbers may be converted more than once.
template <class T>
constexpr bool kLoadsFast = sizeof(T) == sizeof(float) || kWide >= 8;

// e^x for x up to 88, within 2 units in the last place; 0 below -87; NaN stays.
//
// x = n ln 2 + r; the coefficients are those of expf in Cephes.
ANYBIT_INLINE V exponential(V x) {
  const V no_fraction = splat(12582912.0f);  // 1.5 * 2^23, whose last bits then hold n
  const V t = add(multiply(x, splat(1.44269504088896341f)), no_fraction);
  const V n = subtract(t, no_fraction);
  V r = fused(n, splat(-0.693359375f), x);
  r = fused(n, splat(2.12194440e-4f), r);
  V y = splat(1.9875691500e-4f);
  y = fused(y, r, splat(1.3981999507e-3f));
  y = fused(y, r, splat(8.3334519073e-3f));
  y = fused(y, r, splat(4.1665795894e-2f));
  y = fused(y, r, splat(1.6666665459e-1f));
  y = fused(y, r, splat(5.0000001201e-1f));
  y = add(fused(y, multiply(r, r), r), splat(1.0f));
  return select_less(x, splat(-87.0f), splat(0.0f), multiply(y, shifted_exponent(t)));
}

// The polynomial near 0 is that of tanhf in Cephes.
ANYBIT_INLINE V tangent(V x) {
  const V size = magnitude(x), one = splat(1.0f), z = multiply(x, x);
  V y = splat(-5.70498872745e-3f);
  y = fused(y, z, splat(2.06390887954e-2f));
  y = fused(y, z, splat(-5.37397155531e-2f));
  y = fused(y, z, splat(1.33314422036e-1f));
  y = fused(y, z, splat(-3.33332819422e-1f));
  y = fused(multiply(y, z), x, x);
  const V e = exponential(smallest(splat(40.0f), add(size, size)));
  const V far = subtract(one, divide(splat(2.0f), add(e, one)));
  return select_less(size, splat(0.625f), y, with_sign_of(far, x));
}

}  // namespace ANYBIT_SET
}  // namespace anybit::cpu
