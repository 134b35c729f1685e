#include "selftest/layer.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace selftest {
namespace {

constexpr int kWeightOnly = 16;
constexpr int kNorm = 3;  // special

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

float float_from_half(uint16_t half) {
  const int exponent = half >> 10 & 31, mantissa = half & 1023;
  const float sign = half & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(float(1024 + mantissa), exponent - 25)
                          : std::ldexp(float(mantissa), -24));
}

// Nearest fp16, half to even; NaN and infinity stay.
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

uint16_t bfloat_from_float(float v) {
  const uint32_t bits = bits_of(v);
  if (v != v) return 0x7fc0;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace

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

GemmShape shape_of(const Case& c) {
  int planes = 0;
  while ((1 << planes) < c.levels) ++planes;
  return {c.m,          c.n,     c.k,
          c.group_size, planes,  c.wbits,
          c.levels,     c.abits, c.act_symmetric,
          c.dtype,      0,       c.special == kNorm ? 3.0f : 0.0f};
}

std::string text_of(const Case& c) {
  const bool balanced = c.levels == 5 || c.levels == 3;
  const char* types[] = {"fp16", "bf16", "fp32"};
  return "W" + std::to_string(c.wbits) + (balanced ? "*" : "") + "A" + std::to_string(c.abits) +
         (c.act_symmetric ? " sym" : "") + " g" + std::to_string(c.group_size) + " " +
         std::to_string(c.m) + "x" + std::to_string(c.n) + "x" + std::to_string(c.k) + " " +
         types[c.dtype] + (c.bias ? " bias" : "") + (c.special == kNorm ? " norm" : "");
}

Layer::Layer(const Case& c, unsigned seed)
    : c_(c), group_len_(c.group_size ? c.group_size : c.k), groups_(c.k / group_len_) {
  std::mt19937 random(seed);
  make_weights(random);
  make_tokens(random);
  if (c.qqq) pack_nibbles();
  else pack_planes();
  compute();
}

void Layer::make_weights(std::mt19937& random) {
  const auto uniform = [&](double low, double high) {
    return std::uniform_real_distribution<double>(low, high)(random);
  };
  const auto whole = [&](int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(random);
  };
  for (size_t i = 0; i < size_t(c_.n) * c_.k; ++i)
    codes_.push_back(c_.qqq ? whole(-8, 7) : whole(0, c_.levels - 1));
  const size_t scales = c_.qqq ? c_.n : size_t(c_.n) * groups_;
  for (size_t i = 0; i < scales; ++i) {
    scale.push_back(float(c_.qqq ? uniform(1e-4, 2e-3) : uniform(1e-3, 2e-2)));
    if (!c_.qqq)
      zero.push_back(c_.special == 1 && i % 3 == 0 ? whole(-100000, 100000)
                                                   : whole(-c_.levels, 2 * c_.levels));
  }
  if (c_.qqq && c_.group_size)
    for (int i = 0; i < groups_ * c_.n; ++i)
      scale_group.push_back(half_from_float(float(uniform(2, 22) * (whole(0, 1) ? 1 : -1))));
  if (c_.bias)
    for (int i = 0; i < c_.n; ++i) bias.push_back(float(uniform(-5, 5)));
}

void Layer::make_tokens(std::mt19937& random) {
  std::normal_distribution<float> normal(0.3f, 1.0f);
  const auto usual = [&] { return random() % 50 == 0 ? 30 * normal(random) : normal(random); };
  const auto store = [&](std::vector<uint8_t>& bytes, size_t i, float v) {
    const uint16_t half = c_.dtype == kFloat16 ? half_from_float(v) : bfloat_from_float(v);
    if (c_.dtype == kFloat32) std::memcpy(&bytes[4 * i], &v, 4);
    else std::memcpy(&bytes[2 * i], &half, 2);
  };
  const size_t size = c_.dtype == kFloat32 ? 4 : 2;
  x.resize(size_t(c_.m) * c_.k * size);
  if (c_.special == kNorm) gamma.resize(c_.k * size);
  for (int k = 0; k < c_.k && !gamma.empty(); ++k) store(gamma, k, usual());
  for (size_t i = 0; i < size_t(c_.m) * c_.k; ++i) {
    const size_t row = i / c_.k, column = i % c_.k;
    float v = usual();
    if (c_.special == 1) v = row == 0 ? 0.0f : row == 1 && column == 0 ? 6e4f : v;
    if (c_.special == 2 && column == size_t(c_.k) / 2) v = row == 0 ? NAN : row == 1 ? INFINITY : v;
    if (c_.special == kNorm) v = row == 0 ? 0.0f : v < 0 ? -1.0f : 1.0f;
    store(x, i, v);
    v = load(x, i, c_.dtype);
    values_.push_back(
        c_.special == kNorm ? rounded_to(v / 2 * load(gamma, column, c_.dtype), c_.dtype) : v);
  }
}

// plugins/abq_gemm/README.md, "Layout of weight".
void Layer::pack_planes() {
  const int group_words = (group_len_ + 31) / 32;
  const int row_words = (groups_ * group_words + 3) / 4 * 4;
  const int planes = shape_of(c_).planes;
  weight.assign(size_t(planes) * c_.n * row_words, 0);
  for (int n = 0; n < c_.n; ++n)
    for (int k = 0; k < c_.k; ++k)
      for (int j = 0; j < planes; ++j) {
        const int e = k % group_len_, code = codes_[size_t(n) * c_.k + k];
        const size_t word =
            (size_t(j) * c_.n + n) * row_words + k / group_len_ * group_words + e / 32;
        weight[word] = int32_t(uint32_t(weight[word]) | uint32_t(code >> j & 1) << e % 32);
      }
}

// plugins/qqq_gemm/README.md, "Layout of weight".
void Layer::pack_nibbles() {
  const int k_pad = (c_.k + 15) / 16 * 16, n_pad = (c_.n + 63) / 64 * 64;
  // nibble of [b][r]
  const int channel[2][4] = {{1, 3, 5, 7}, {0, 2, 4, 6}};
  const int group[2][4] = {{0, 4, 1, 5}, {2, 6, 3, 7}};
  std::vector<uint32_t> words(size_t(k_pad / 16) * 2 * n_pad, 0);
  for (int n = 0; n < n_pad; ++n)
    for (int k = 0; k < k_pad; ++k) {
      const int code = n < c_.n && k < c_.k ? codes_[size_t(n) * c_.k + k] : 0;
      const int lane = 4 * (n % 8) + k % 16 / 4, j = n % 64 / 16, b = n % 16 / 8, r = k % 4;
      const uint32_t nibble = uint32_t(c_.group_size ? code + 8 : code) & 15;
      words[size_t(k / 16) * 2 * n_pad + 128 * size_t(n / 64) + 4 * lane + j] |=
          nibble << 4 * (c_.group_size ? group : channel)[b][r];
    }
  weight.assign(words.begin(), words.end());
}

int32_t Layer::int8_weight(int n, int k) const {
  const int code = codes_[size_t(n) * c_.k + k];
  if (!c_.group_size) return code;
  const float product =
      float(code) * float_from_half(scale_group[size_t(k / c_.group_size) * c_.n + n]);
  return int32_t(std::clamp(std::nearbyint(product), -127.0f, 127.0f));
}

void Layer::compute() {
  for (int m = 0; m < c_.m; ++m) {
    const float* row = &values_[size_t(m) * c_.k];
    // plugins/core/activation.py: the range includes 0; every fp32 operation is rounded on its own
    float low = 0, high = 0;
    bool finite = true;
    for (int k = 0; k < c_.k; ++k)
      low = std::min(low, row[k]), high = std::max(high, row[k]), finite &= std::isfinite(row[k]);
    const int bits = std::min(c_.abits, 8);
    const int most = (1 << (bits - 1)) - 1;
    const int least = c_.act_symmetric ? -most : -most - 1;
    const float range = std::max(c_.act_symmetric ? std::max(-low, high) : high - low, 0x1p-118f);
    const float step = finite ? range / float(c_.act_symmetric ? most : (1 << bits) - 1) : NAN;
    const float inverse = 1.0f / step;
    const auto limited = [&](float v, int offset) {
      return finite ? int(std::clamp(std::nearbyint(v) + float(offset), float(least), float(most)))
                    : 0;
    };
    const int z = c_.act_symmetric ? 0 : limited(-low * inverse, least);
    std::vector<int64_t> a(c_.k);
    for (int k = 0; k < c_.k; ++k) a[k] = limited(row[k] * inverse, z);
    for (int n = 0; n < c_.n; ++n) {
      float y = 0;
      double exact = 0, sum = 3;
      int64_t total = 0;
      for (int g = 0; g < groups_; ++g) {
        int64_t d = 0;
        for (int k = g * group_len_; k < (g + 1) * group_len_; ++k) {
          if (c_.qqq) {
            d += a[k] * int8_weight(n, k);
            continue;
          }
          const int64_t w = codes_[size_t(n) * c_.k + k] - int64_t(zero[size_t(n) * groups_ + g]);
          const double s = scale[size_t(n) * groups_ + g];
          d += (a[k] - z) * w;
          exact += double(row[k]) * (double(w) * s);
          sum += std::fabs(double(row[k]) * (double(w) * s));
        }
        total += d;
        if (!c_.qqq) y = y + float(d) * scale[size_t(n) * groups_ + g];
      }
      if (c_.qqq) y = float(total) * scale[n];
      y = c_.abits == kWeightOnly ? float(exact) : y * step;
      if (c_.bias) y = y + bias[n];
      want.push_back(rounded_to(y, c_.dtype));
      size.push_back(float(sum));
    }
  }
}

}  // namespace selftest
