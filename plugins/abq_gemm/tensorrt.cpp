// ABQGemm as a TensorRT plugin: weights as bit planes, a scale and a zero point or minimum per
// output channel and group.
#include "abq_gemm/rules.h"
#include "core/tensorrt/plugin_base.h"

namespace {

using anybit::GemmAttributes;
using nvinfer1::DataType;

constexpr int32_t kWordBits = 32;
// words: rows of the packed weight start at multiples of 16 bytes
constexpr int64_t kRowAlignment = 4;

bool check(const GemmAttributes& a, const std::string& where) {
  if (!anybit::abq_levels_ok(a.wbits, a.levels)) {
    return anybit::fail(
        where,
        anybit::format(
            "got levels %d with wbits %d, expected %d, or 5 with 2 bits, or 3 with 1 bit", a.levels,
            a.wbits, 1 << a.wbits),
        "Export the model again with settings in range");
  }
  if (!anybit::abq_abits_ok(a.abits)) {
    return anybit::fail(
        where, anybit::format("got abits %d, expected 2 to 8, or 16 for weight-only", a.abits),
        "Export the model again with settings in range");
  }
  const int64_t largest = anybit::abq_largest_sum(a.levels, a.group_len());
  if (a.abits == anybit::kAbqWeightOnly || largest < int64_t{1} << 31) return true;
  return anybit::fail(where,
                      anybit::format("got sums of up to %lld, expected less than 2^31",
                                     static_cast<long long>(largest)),
                      "Use a smaller --group-size");
}

std::vector<anybit::InputSpec> inputs(const GemmAttributes& a) {
  const int64_t group_words = (int64_t{a.group_len()} + kWordBits - 1) / kWordBits;
  const int64_t row_words =
      (a.n_groups() * group_words + kRowAlignment - 1) / kRowAlignment * kRowAlignment;
  return {
      {"weight", anybit::Slot::kWeight, DataType::kINT32, {a.planes(), a.out_features, row_words}},
      {"scale", anybit::Slot::kScale, DataType::kFLOAT, {a.out_features, a.n_groups()}},
      {"zero", anybit::Slot::kZero, DataType::kINT32, {a.out_features, a.n_groups()}},
  };
}

const anybit::GemmOp kOp{"ABQGemm", check, inputs};
anybit::GemmCreator creator(kOp);

}  // namespace
