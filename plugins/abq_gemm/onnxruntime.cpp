// ABQGemm as an ONNX Runtime custom op: weights as bit planes, a scale and a zero point or minimum per
// output channel and group.
#include "core/onnxruntime/custom_op.h"

namespace {

using anybit::ort::InputSpec;
using namespace anybit;

constexpr int64_t kWordBits = 32;
constexpr int64_t kRowAlignment = 4;  // words: rows start at multiples of 16 bytes

std::vector<InputSpec> inputs(const GemmShape& s) {
  const int64_t n_groups = s.group_size ? s.k / s.group_size : 1;
  const int64_t group_words = (s.k / n_groups + kWordBits - 1) / kWordBits;
  const int64_t row_words =
      (n_groups * group_words + kRowAlignment - 1) / kRowAlignment * kRowAlignment;
  const InputSpec zero = {
      "zero",
      [](GemmBuffers& b, const void* p) { b.zero = static_cast<const int32_t*>(p); },
      ort::kInt32,
      {s.n, n_groups}};
  const InputSpec minimum = {
      "minimum",
      [](GemmBuffers& b, const void* p) { b.minimum = static_cast<const float*>(p); },
      ort::kFloat,
      {s.n, n_groups}};
  return {
      {"weight",
       [](GemmBuffers& b, const void* p) { b.weight = static_cast<const int32_t*>(p); },
       ort::kInt32,
       {s.planes, s.n, row_words}},
      {"scale",
       [](GemmBuffers& b, const void* p) { b.scale = static_cast<const float*>(p); },
       ort::kFloat,
       {s.n, n_groups}},
      s.has_minimum ? minimum : zero,
  };
}

// the fourth is int32 zero points or fp32 minimums
const ort::GemmOp kOp{
    "ABQGemm", {ort::kUndefined, ort::kInt32, ort::kFloat, ort::kUndefined}, inputs};
const ort::GemmRegistration registration(kOp);

}  // namespace
