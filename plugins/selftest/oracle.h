// What the self-test knows about an op: its cases, and packing and arithmetic from the formulas of
// its README.md, nothing of the kernels. Each op's folder has one in selftest.cpp, a static object.
#pragma once
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "core/host/params.h"

namespace selftest {

enum class Special {
  kNone,
  kExtremes,   // a row of zeros, a row with an outlier, zero points far outside the codes
  kNotFinite,  // a row with a NaN and one with an infinity
  // RMSNorm, of rows of +-1 and one of zeros, with an epsilon of 3. The root is exactly 2 then, in
  // whatever order the squares add up, so that nothing is a near tie.
  kNorm,
  kMinimum,  // a minimum in the place of the zero points
};

struct Case {
  int wbits, levels, abits, act_symmetric, group_size;
  int m, n, k;
  int32_t dtype;
  bool bias;
  Special special = Special::kNone;

  int group_len() const { return group_size ? group_size : k; }
  int n_groups() const { return k / group_len(); }
};

GemmShape shape_of(const Case& c);
std::string text_of(const Case& c);

// Sizes around the edges of tiles and words.
std::vector<int> edge_m(bool quick);
std::vector<int> edge_n(bool quick);
std::vector<int> edge_k(bool quick);

class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}
  double uniform(double low, double high) {
    return std::uniform_real_distribution<double>(low, high)(engine_);
  }
  int whole(int low, int high) { return std::uniform_int_distribution<int>(low, high)(engine_); }
  float normal(float mean, float deviation) {
    return std::normal_distribution<float>(mean, deviation)(engine_);
  }

 private:
  std::mt19937 engine_;
};

// Of a layer; `packed` and the others as the C interface takes them, empty what the op has not.
struct Weights {
  std::vector<int> codes;  // [n, k]
  std::vector<int32_t> packed;
  std::vector<float> scale;
  std::vector<int32_t> zero;
  std::vector<float> minimum;
  std::vector<uint16_t> scale_group;
};

// A row of x, and what it becomes with up to 8 bits.
struct Token {
  const float* values;         // [k]
  std::vector<int64_t> codes;  // [k]
  int64_t zero;
  float step;
};

struct Output {
  float y;     // without the bias, not rounded to the type of y
  float size;  // sum of |terms|, to which rounding in another order is proportional
};

class Oracle {
 public:
  explicit Oracle(const char* op_name);  // adds it to oracles()
  Oracle(const Oracle&) = delete;
  Oracle& operator=(const Oracle&) = delete;
  virtual ~Oracle() = default;

  virtual std::vector<Case> cases(bool quick) const = 0;
  virtual Weights random_weights(const Case& c, Random& random) const = 0;
  virtual Output output(const Case& c, const Weights& weights, const Token& token, int n) const = 0;
  // Whether y is the same to the last bit where K is divided into this many shares.
  virtual bool exact(const Case& c, int shares) const = 0;

  const char* const op;
};

// In order of the ops' names.
const std::vector<const Oracle*>& oracles();

}  // namespace selftest
