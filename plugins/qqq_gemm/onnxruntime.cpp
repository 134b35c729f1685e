// QQQGemm as an ONNX Runtime custom op: nibbles in the order of the tensor cores, per channel or
// with second-level group scales.
#include "core/onnxruntime/custom_op.h"

namespace {

using anybit::ort::InputSpec;
using namespace anybit;

constexpr int64_t kTileK = 16;  // input features in one row of the packed weight
constexpr int64_t kTileN = 64;  // output features in one 128-word tile of it

std::vector<InputSpec> inputs(const GemmShape& s) {
  const int64_t rows = (s.k + kTileK - 1) / kTileK;
  const int64_t padded_n = (s.n + kTileN - 1) / kTileN * kTileN;
  std::vector<InputSpec> list{
      {"weight",
       [](GemmBuffers& b, const void* p) { b.weight = static_cast<const int32_t*>(p); },
       ort::kInt32,
       {rows, 2 * padded_n}},
      {"scale",
       [](GemmBuffers& b, const void* p) { b.scale = static_cast<const float*>(p); },
       ort::kFloat,
       {s.n, 1}},
  };
  if (s.group_size != 0)
    list.push_back({"scale_group",
                    [](GemmBuffers& b, const void* p) { b.scale_group = p; },
                    ort::kHalf,
                    {s.k / s.group_size, s.n}});
  return list;
}

const ort::GemmOp kOp{"QQQGemm", {ort::kUndefined, ort::kInt32, ort::kFloat}, inputs};
const ort::GemmRegistration registration(kOp);

}  // namespace
