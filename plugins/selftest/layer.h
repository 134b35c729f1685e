// A random low-bit layer and what it must compute: packing and arithmetic from the formulas of the
// ops' README.md, nothing of the kernels.
#pragma once
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "core/host/params.h"

namespace selftest {

struct Case {
  bool qqq;
  int wbits, levels, abits, act_symmetric, group_size;
  int m, n, k;
  int32_t dtype;
  bool bias;
  int special = 0;  // kinds of tokens and zero points, see Layer
};

GemmShape shape_of(const Case& c);
std::string text_of(const Case& c);

// special 1: a row of zeros, a row with an outlier, zero points far outside the codes.
// special 2: a row with a NaN and one with an infinity.
// special 3: RMSNorm, of rows of +-1 and one of zeros, with an epsilon of 3. The root is exactly 2
// then, in whatever order the squares
//   add up, so that nothing is a near tie.
class Layer {
 public:
  Layer(const Case& c, unsigned seed);

  // Packed inputs as the C interface takes them.
  std::vector<uint8_t> x;  // [m, k] of the case's type
  std::vector<int32_t> weight;
  std::vector<float> scale;
  std::vector<int32_t> zero;
  std::vector<uint16_t> scale_group;
  std::vector<float> bias;
  std::vector<uint8_t> gamma;  // [k] of the case's type
  // What y must be, and per output the sum of |terms|, to which rounding in
  // another order is proportional.
  std::vector<float> want, size;

 private:
  void make_weights(std::mt19937& random);
  void make_tokens(std::mt19937& random);
  void pack_planes();
  void pack_nibbles();
  void compute();
  int32_t int8_weight(int n, int k) const;  // QQQGemm

  Case c_;
  int group_len_, groups_;
  std::vector<int> codes_;     // [n, k]
  std::vector<float> values_;  // x as fp32, after the norm
};

// The number that `bytes` hold at element i, of type dtype.
float load(const std::vector<uint8_t>& bytes, size_t i, int32_t dtype);
// v rounded to dtype, too large numbers to the largest.
float rounded_to(float v, int32_t dtype);
// Distance of neighbouring numbers of type dtype, relative.
float epsilon_of(int32_t dtype);

}  // namespace selftest
