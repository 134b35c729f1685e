// ABQGemm in the self-test, from the formulas of README.md.
#include <cmath>

#include "selftest/oracle.h"

namespace {

using selftest::Case;
using selftest::Output;
using selftest::Special;
using selftest::Token;
using selftest::Weights;

constexpr int kWeightOnly = 16;  // abits

// README.md, "Layout of weight".
std::vector<int32_t> packed_planes(const Case& c, const std::vector<int>& codes) {
  const int group_words = (c.group_len() + 31) / 32;
  const int row_words = (c.n_groups() * group_words + 3) / 4 * 4;
  const int planes = shape_of(c).planes;
  std::vector<uint32_t> words(size_t(planes) * c.n * row_words, 0);
  for (int n = 0; n < c.n; ++n)
    for (int k = 0; k < c.k; ++k)
      for (int j = 0; j < planes; ++j) {
        const int group = k / c.group_len(), e = k % c.group_len();
        const uint32_t bit = codes[size_t(n) * c.k + k] >> j & 1;
        words[(size_t(j) * c.n + n) * row_words + group * group_words + e / 32] |= bit << e % 32;
      }
  return {words.begin(), words.end()};
}

class AbqOracle final : public selftest::Oracle {
 public:
  AbqOracle() : Oracle("ABQGemm") {}

  Weights random_weights(const Case& c, selftest::Random& random) const override {
    Weights weights;
    for (size_t i = 0; i < size_t(c.n) * c.k; ++i)
      weights.codes.push_back(random.whole(0, c.levels - 1));
    for (size_t i = 0; i < size_t(c.n) * c.n_groups(); ++i) {
      weights.scale.push_back(float(random.uniform(1e-3, 2e-2)));
      if (c.special == Special::kMinimum) {
        weights.minimum.push_back(float(random.uniform(-2e-2, 1e-3) * c.levels));
        continue;
      }
      const bool far = c.special == Special::kExtremes && i % 3 == 0;
      weights.zero.push_back(far ? random.whole(-100000, 100000)
                                 : random.whole(-c.levels, 2 * c.levels));
    }
    weights.packed = packed_planes(c, weights.codes);
    return weights;
  }

  Output output(const Case& c, const Weights& weights, const Token& token, int n) const override {
    float y = 0;
    double exact = 0, size = 3;
    for (int g = 0; g < c.n_groups(); ++g) {
      const float scale = weights.scale[size_t(n) * c.n_groups() + g];
      const bool has_minimum = c.special == Special::kMinimum;
      const int64_t zero = has_minimum ? 0 : weights.zero[size_t(n) * c.n_groups() + g];
      const float minimum = has_minimum ? weights.minimum[size_t(n) * c.n_groups() + g] : 0;
      int64_t d = 0, sum = 0;
      for (int k = g * c.group_len(); k < (g + 1) * c.group_len(); ++k) {
        const int64_t w = weights.codes[size_t(n) * c.k + k] - zero;
        const double value = token.values[k], scaled = double(w) * double(scale);
        d += (token.codes[k] - token.zero) * w;
        sum += token.codes[k] - token.zero;
        exact += value * (scaled + double(minimum));
        size += std::fabs(value) * (std::fabs(scaled) + std::fabs(double(minimum)));
      }
      y = y + (float(d) * scale + float(sum) * minimum);
    }
    return {c.abits == kWeightOnly ? float(exact) : y * token.step, float(size)};
  }

  // fp32 terms of groups add up in the order of the shares, those of A16 in the hardware's.
  bool exact(const Case& c, int shares) const override {
    return c.abits != kWeightOnly && (c.group_size == 0 || shares == 1);
  }

  std::vector<Case> cases(bool quick) const override {
    std::vector<Case> list;
    const auto add = [&](int wbits, int levels, int abits, int symmetric, int group, int m, int n,
                         int k, int32_t dtype, Special special = Special::kNone) {
      list.push_back({wbits, levels, abits, symmetric, group, m, n, k, dtype, n % 2 == 1, special});
    };
    const auto add_widths = [&](int wbits, int levels) {
      for (int abits = 2; abits <= 8; ++abits)
        add(wbits, levels, abits, abits % 2, 0, quick ? 3 : 9, 70, 320, kFloat16);
      add(wbits, levels, 8, 0, 64, 9, 35, 192, kFloat16);
      add(wbits, levels, kWeightOnly, 0, 0, 9, 70, 320, kFloat16);
      add(wbits, levels, kWeightOnly, 0, 64, 2, 70, 192, kBFloat16);
    };
    for (int wbits = 1; wbits <= 8; ++wbits) add_widths(wbits, 1 << wbits);
    add_widths(1, 3);
    add_widths(2, 5);
    for (const int n : selftest::edge_n(quick))
      for (const int k : selftest::edge_k(quick)) {
        add(4, 16, 8, 0, 0, 2, n, k, kFloat32);
        add(3, 8, kWeightOnly, 0, 0, 2, n, k, kFloat16);
      }
    for (const int m : selftest::edge_m(quick)) {
      add(2, 5, 8, 0, 0, m, 66, 256, kFloat16);
      add(4, 16, 4, 1, 128, m, 66, 256, kFloat16);
      add(4, 16, kWeightOnly, 0, 0, m, 66, 256, kFloat16);
    }
    for (const int group : {32, 40, 96, 128, 256, 512}) {
      add(4, 16, 8, 0, group, 3, 33, 2 * group, kFloat16);
      add(2, 4, kWeightOnly, 0, group, 3, 33, 2 * group, kFloat16);
    }
    for (const int abits : {2, 8, kWeightOnly})
      for (const int group : {0, 16, 32, 128}) {
        add(4, 16, abits, 0, group, 3, 33, 256, kFloat16, Special::kMinimum);
        add(6, 64, abits, abits == 8, group, 9, 70, 256, kBFloat16, Special::kMinimum);
      }
    for (const Special special : {Special::kExtremes, Special::kNotFinite, Special::kNorm})
      for (const int32_t dtype : {kFloat16, kBFloat16, kFloat32}) {
        add(4, 16, 8, 0, 0, 3, 40, 256, dtype, special);
        add(8, 256, 8, 1, 64, 3, 40, 256, dtype, special);
        if (special != Special::kNotFinite)
          add(4, 16, kWeightOnly, 0, 64, 3, 40, 256, dtype, special);
      }
    return list;
  }
};

const AbqOracle oracle;

}  // namespace
