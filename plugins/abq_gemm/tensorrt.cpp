// ABQGemm as a TensorRT plugin: weights as bit planes, a scale and a zero point per
// output channel and group.
#include "core/tensorrt/plugin_base.h"

namespace {

using anybit::GemmAttributes;
using nvinfer1::DataType;

constexpr int32_t kWeightOnly = 16;  // abits: activations stay floating point
constexpr int32_t kWordBits = 32;
// words: rows of the packed weight start at multiples of 16 bytes
constexpr int64_t kRowAlignment = 4;

bool check(const GemmAttributes& a, const std::string& where) {
  const bool balanced = (a.wbits == 2 && a.levels == 5) || (a.wbits == 1 && a.levels == 3);
  if (!balanced && a.levels != 1 << a.wbits) {
    return anybit::fail(
        where,
        anybit::format(
            "got levels %d with wbits %d, expected %d, or 5 with 2 bits, or 3 with 1 bit", a.levels,
            a.wbits, 1 << a.wbits),
        "Export the model again with settings in range");
  }
  if (a.abits > 8 && a.abits != kWeightOnly) {
    return anybit::fail(
        where, anybit::format("got abits %d, expected 2 to 8, or 16 for weight-only", a.abits),
        "Export the model again with settings in range");
  }
  const int64_t largest = int64_t{128} * (a.levels - 1) * a.group_len();
  // the integer sum of a group must fit 32 bits
  if (a.abits == kWeightOnly || largest < int64_t{1} << 31) return true;
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
