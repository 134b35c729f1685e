// A random layer of an op and what it must compute.
#pragma once
#include <cstdint>
#include <vector>

#include "selftest/oracle.h"

namespace selftest {

class Layer {
 public:
  Layer(const Oracle& oracle, const Case& c, unsigned seed);

  Weights weights;
  std::vector<float> bias;     // [n]
  std::vector<uint8_t> x;      // [m, k] of the case's type
  std::vector<uint8_t> gamma;  // [k] of the case's type, with a norm
  // What y [m, n] must be, and of each output the sum of |terms|.
  std::vector<float> want, size;

 private:
  std::vector<float> random_tokens(const Case& c, Random& random);
};

}  // namespace selftest
