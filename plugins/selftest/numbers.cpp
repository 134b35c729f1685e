#include "selftest/numbers.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace selftest {
namespace {

uint32_t bits_of(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}
float float_of(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}

uint16_t bfloat_from_float(float v) {
  const uint32_t bits = bits_of(v);
  if (v != v) return 0x7fc0;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace

size_t size_of(int32_t dtype) { return dtype == kFloat32 ? 4 : 2; }

float float_from_half(uint16_t half) {
  const int exponent = half >> 10 & 31, mantissa = half & 1023;
  const float sign = half & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(float(1024 + mantissa), exponent - 25)
                          : std::ldexp(float(mantissa), -24));
}

uint16_t half_from_float(float v) {
  const uint16_t sign = uint16_t(bits_of(v) >> 16 & 0x8000);
  const float size = std::fabs(v);
  if (v != v) return uint16_t(sign | 0x7e00);
  if (size >= 65520.0f) return uint16_t(sign | 0x7c00);
  int exponent = 0;
  std::frexp(size, &exponent);
  exponent = std::max(exponent, -13);
  // 11 bits, or fewer of a subnormal number
  const int mantissa = int(std::nearbyint(std::ldexp(size, 11 - exponent)));
  if (mantissa < 1024) return uint16_t(sign | mantissa);
  // a mantissa of 2048 carries into the exponent
  return uint16_t(sign | (((exponent + 13) << 10) + mantissa));
}

float load(const std::vector<uint8_t>& bytes, size_t i, int32_t dtype) {
  if (dtype == kFloat32) {
    float v;
    std::memcpy(&v, &bytes[4 * i], 4);
    return v;
  }
  uint16_t half;
  std::memcpy(&half, &bytes[2 * i], 2);
  return dtype == kFloat16 ? float_from_half(half) : float_of(uint32_t(half) << 16);
}

void store(std::vector<uint8_t>& bytes, size_t i, int32_t dtype, float v) {
  if (dtype == kFloat32) {
    std::memcpy(&bytes[4 * i], &v, 4);
    return;
  }
  const uint16_t half = dtype == kFloat16 ? half_from_float(v) : bfloat_from_float(v);
  std::memcpy(&bytes[2 * i], &half, 2);
}

float rounded_to(float v, int32_t dtype) {
  if (dtype == kFloat32 || v != v) return v;
  const float most = dtype == kFloat16 ? 65504.0f : 3.38953139e38f;
  v = std::clamp(v, -most, most);
  return dtype == kFloat16 ? float_from_half(half_from_float(v))
                           : float_of(uint32_t(bfloat_from_float(v)) << 16);
}

float epsilon_of(int32_t dtype) {
  return dtype == kFloat16 ? 0x1p-10f : dtype == kBFloat16 ? 0x1p-7f : 0x1p-23f;
}

}  // namespace selftest
