// QQQGemm in the self-test, from the formulas of README.md.
#include <algorithm>
#include <cmath>

#include "selftest/numbers.h"
#include "selftest/oracle.h"

namespace {

using selftest::Case;
using selftest::Output;
using selftest::Special;
using selftest::Token;
using selftest::Weights;

// README.md, "Layout of weight".
std::vector<int32_t> packed_nibbles(const Case& c, const std::vector<int>& codes) {
  // nibble of [b][r]
  const int channel[2][4] = {{1, 3, 5, 7}, {0, 2, 4, 6}},
            group[2][4] = {{0, 4, 1, 5}, {2, 6, 3, 7}};
  const int k_pad = (c.k + 15) / 16 * 16, n_pad = (c.n + 63) / 64 * 64;
  std::vector<uint32_t> words(size_t(k_pad / 16) * 2 * n_pad, 0);
  for (int n = 0; n < n_pad; ++n)
    for (int k = 0; k < k_pad; ++k) {
      const int code = n < c.n && k < c.k ? codes[size_t(n) * c.k + k] : 0;
      const uint32_t nibble = uint32_t(c.group_size ? code + 8 : code) & 15;
      const int lane = 4 * (n % 8) + k % 16 / 4, j = n % 64 / 16, b = n % 16 / 8, r = k % 4;
      const int place = (c.group_size ? group : channel)[b][r];
      words[size_t(k / 16) * 2 * n_pad + 128 * size_t(n / 64) + 4 * lane + j] |= nibble
                                                                                 << 4 * place;
    }
  return {words.begin(), words.end()};
}

class QqqOracle final : public selftest::Oracle {
 public:
  QqqOracle() : Oracle("QQQGemm") {}

  Weights random_weights(const Case& c, selftest::Random& random) const override {
    Weights weights;
    for (size_t i = 0; i < size_t(c.n) * c.k; ++i) weights.codes.push_back(random.whole(-8, 7));
    for (int n = 0; n < c.n; ++n) weights.scale.push_back(float(random.uniform(1e-4, 2e-3)));
    for (int i = 0; i < c.n_groups() * c.n && c.group_size; ++i) {
      const int sign = random.whole(0, 1) ? 1 : -1;
      weights.scale_group.push_back(selftest::half_from_float(float(random.uniform(2, 22) * sign)));
    }
    weights.packed = packed_nibbles(c, weights.codes);
    return weights;
  }

  Output output(const Case& c, const Weights& weights, const Token& token, int n) const override {
    int64_t sum = 0;
    for (int k = 0; k < c.k; ++k) sum += token.codes[k] * int8_weight(c, weights, n, k);
    return {float(sum) * weights.scale[n] * token.step, 0};
  }

  bool exact(const Case&, int) const override { return true; }  // integers until the last steps

  std::vector<Case> cases(bool quick) const override {
    std::vector<Case> list;
    const auto add = [&](int group, int m, int n, int k, int32_t dtype,
                         Special special = Special::kNone) {
      list.push_back({4, 16, 8, 1, group, m, n, k, dtype, n % 2 == 1, special});
    };
    for (const int n : selftest::edge_n(quick))
      for (const int k : selftest::edge_k(quick)) add(0, 2, n, k, kFloat32);
    for (const int m : selftest::edge_m(quick))
      for (const int group : {0, 64, 128}) add(group, m, 66, 256, kFloat16);
    for (const Special special : {Special::kExtremes, Special::kNotFinite, Special::kNorm})
      for (const int32_t dtype : {kFloat16, kBFloat16, kFloat32}) {
        add(0, 3, 40, 256, dtype, special);
        add(128, 3, 40, 256, dtype, special);
      }
    return list;
  }

 private:
  static int64_t int8_weight(const Case& c, const Weights& weights, int n, int k) {
    const int code = weights.codes[size_t(n) * c.k + k];
    if (!c.group_size) return code;
    const uint16_t scale = weights.scale_group[size_t(k / c.group_size) * c.n + n];
    const float product = float(code) * selftest::float_from_half(scale);
    return int64_t(std::clamp(std::nearbyint(product), -127.0f, 127.0f));
  }
};

const QqqOracle oracle;

}  // namespace
