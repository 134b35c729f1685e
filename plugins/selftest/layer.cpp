#include "selftest/layer.h"

#include <algorithm>
#include <cmath>

#include "selftest/numbers.h"

namespace selftest {
namespace {

// plugins/core/activation.py: the range includes 0; every fp32 operation is rounded on its own.
Token quantized(const float* row, const Case& c) {
  float low = 0, high = 0;
  bool finite = true;
  for (int k = 0; k < c.k; ++k) {
    low = std::min(low, row[k]);
    high = std::max(high, row[k]);
    finite &= std::isfinite(row[k]);
  }
  const int bits = std::min(c.abits, 8);
  const int most = (1 << (bits - 1)) - 1;
  const int least = c.act_symmetric ? -most : -most - 1;
  const float range = std::max(c.act_symmetric ? std::max(-low, high) : high - low, 0x1p-118f);
  const int steps = c.act_symmetric ? most : (1 << bits) - 1;
  Token token{};
  token.values = row;
  token.step = finite ? range / float(steps) : NAN;
  const float inverse = 1.0f / token.step;
  const auto limited = [&](float v, int offset) {
    if (!finite) return 0;
    return int(std::clamp(std::nearbyint(v) + float(offset), float(least), float(most)));
  };
  const int zero = c.act_symmetric ? 0 : limited(-low * inverse, least);
  token.zero = zero;
  for (int k = 0; k < c.k; ++k) token.codes.push_back(limited(row[k] * inverse, zero));
  return token;
}

}  // namespace

Layer::Layer(const Oracle& oracle, const Case& c, unsigned seed) {
  Random random(seed);
  weights = oracle.random_weights(c, random);
  for (int n = 0; n < c.n && c.bias; ++n) bias.push_back(float(random.uniform(-5, 5)));
  const std::vector<float> values = random_tokens(c, random);
  for (int m = 0; m < c.m; ++m) {
    const Token token = quantized(&values[size_t(m) * c.k], c);
    for (int n = 0; n < c.n; ++n) {
      const Output output = oracle.output(c, weights, token, n);
      want.push_back(rounded_to(c.bias ? output.y + bias[n] : output.y, c.dtype));
      size.push_back(output.size);
    }
  }
}

// Fills x and gamma; returns x as fp32, after the norm.
std::vector<float> Layer::random_tokens(const Case& c, Random& random) {
  const auto usual = [&] {
    const float v = random.normal(0.3f, 1.0f);
    return random.whole(0, 49) == 0 ? 30 * v : v;
  };
  const bool norm = c.special == Special::kNorm;
  x.resize(size_t(c.m) * c.k * size_of(c.dtype));
  if (norm) gamma.resize(c.k * size_of(c.dtype));
  for (int k = 0; k < c.k && norm; ++k) store(gamma, k, c.dtype, usual());
  std::vector<float> values;
  for (size_t i = 0; i < size_t(c.m) * c.k; ++i) {
    const size_t row = i / c.k, column = i % c.k;
    float v = usual();
    if (c.special == Special::kExtremes) v = row == 0 ? 0 : row == 1 && column == 0 ? 6e4f : v;
    if (c.special == Special::kNotFinite && column == size_t(c.k) / 2)
      v = row == 0 ? NAN : row == 1 ? INFINITY : v;
    if (norm) v = row == 0 ? 0.0f : v < 0 ? -1.0f : 1.0f;
    store(x, i, c.dtype, v);
    v = load(x, i, c.dtype);
    // the root of the mean square plus epsilon is 2, see Special::kNorm
    values.push_back(norm ? rounded_to(v / 2 * load(gamma, column, c.dtype), c.dtype) : v);
  }
  return values;
}

}  // namespace selftest
