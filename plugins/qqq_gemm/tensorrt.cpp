// QQQGemm as a TensorRT plugin: W4A8, nibbles in the order of the tensor cores, per channel or with
// second-level group scales.
#include "core/tensorrt/plugin_base.h"
#include "qqq_gemm/rules.h"

namespace {

using anybit::GemmAttributes;
using nvinfer1::DataType;

constexpr int64_t kTileK = 16;  // input features in one row of the packed weight
constexpr int64_t kTileN = 64;  // output features in one 128-word tile of it

bool check(const GemmAttributes& a, const std::string& where) {
  if (!anybit::qqq_bits_ok(a.wbits, a.levels, a.abits, a.act_symmetric)) {
    return anybit::fail(
        where,
        anybit::format("got wbits %d, levels %d, abits %d, act_symmetric %d, expected 4, 16, 8, 1",
                       a.wbits, a.levels, a.abits, a.act_symmetric),
        "Use ABQGemm for other bit widths");
  }
  if (!anybit::qqq_group_ok(a.group_size)) {
    return anybit::fail(
        where,
        anybit::format("got group_size %d, expected 0 (per channel), 64 or 128", a.group_size),
        "Choose one of these, or --method abq");
  }
  if (anybit::qqq_sum_ok(a.in_features)) return true;
  return anybit::fail(
      where,
      anybit::format("got in_features %d, whose integer sum overflows 32 bits", a.in_features),
      "Use ABQGemm with groups for this layer");
}

std::vector<anybit::InputSpec> inputs(const GemmAttributes& a) {
  const int64_t rows = (int64_t{a.in_features} + kTileK - 1) / kTileK;
  const int64_t padded_n = (int64_t{a.out_features} + kTileN - 1) / kTileN * kTileN;
  std::vector<anybit::InputSpec> list{
      {"weight", anybit::Slot::kWeight, DataType::kINT32, {rows, 2 * padded_n}},
      {"scale", anybit::Slot::kScale, DataType::kFLOAT, {a.out_features, 1}},
  };
  if (a.group_size != 0)
    list.push_back({"scale_group",
                    anybit::Slot::kScaleGroup,
                    DataType::kHALF,
                    {a.n_groups(), a.out_features}});
  return list;
}

const anybit::GemmOp kOp{"QQQGemm", check, inputs};
anybit::GemmCreator creator(kOp);

}  // namespace
