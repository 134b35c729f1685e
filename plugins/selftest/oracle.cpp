#include "selftest/oracle.h"

#include <algorithm>
#include <cstring>

namespace selftest {
namespace {

// A function's static, so that it exists before the first oracle whatever the order of the op
// folders.
std::vector<const Oracle*>& list() {
  static std::vector<const Oracle*> all;
  return all;
}

constexpr float kNormEpsilon = 3.0f;  // Special::kNorm

}  // namespace

Oracle::Oracle(const char* op_name) : op(op_name) {
  const auto comes_before = [](const Oracle* a, const Oracle* b) {
    return std::strcmp(a->op, b->op) < 0;
  };
  list().insert(std::upper_bound(list().begin(), list().end(), this, comes_before), this);
}

const std::vector<const Oracle*>& oracles() { return list(); }

GemmShape shape_of(const Case& c) {
  GemmShape shape = {};
  shape.m = c.m;
  shape.n = c.n;
  shape.k = c.k;
  shape.group_size = c.group_size;
  while ((1 << shape.planes) < c.levels) ++shape.planes;
  shape.wbits = c.wbits;
  shape.levels = c.levels;
  shape.abits = c.abits;
  shape.act_symmetric = c.act_symmetric;
  shape.dtype = c.dtype;
  shape.norm_epsilon = c.special == Special::kNorm ? kNormEpsilon : 0.0f;
  shape.has_minimum = c.special == Special::kMinimum;
  return shape;
}

std::string text_of(const Case& c) {
  const bool balanced = c.levels == 5 || c.levels == 3;
  const char* types[] = {"fp16", "bf16", "fp32"};
  return "W" + std::to_string(c.wbits) + (balanced ? "*" : "") + "A" + std::to_string(c.abits) +
         (c.act_symmetric ? " sym" : "") + " g" + std::to_string(c.group_size) + " " +
         std::to_string(c.m) + "x" + std::to_string(c.n) + "x" + std::to_string(c.k) + " " +
         types[c.dtype] + (c.bias ? " bias" : "") + (c.special == Special::kNorm ? " norm" : "") +
         (c.special == Special::kMinimum ? " minimum" : "");
}

std::vector<int> edge_m(bool quick) {
  if (quick) return {1, 7, 8, 9, 16, 17};
  return {1, 7, 8, 9, 16, 17, 63, 65};
}

std::vector<int> edge_n(bool quick) {
  if (quick) return {1, 65};
  return {1, 63, 64, 65, 130, 257};
}

std::vector<int> edge_k(bool quick) {
  if (quick) return {33, 513};
  return {1, 31, 33, 127, 128, 129, 513, 1040, 2100};
}

}  // namespace selftest
