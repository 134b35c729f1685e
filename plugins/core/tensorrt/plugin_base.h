// A low-bit GEMM as a TensorRT plugin: the op folder says what is special about it, plugin_base.cpp
// holds the IPluginV3 overrides.
//
// An op folder's tensorrt.cpp fills one GemmOp and makes one static GemmCreator of it;
// that registers the plugin.
#pragma once
#include <NvInferRuntime.h>

#include <cstdint>
#include <string>
#include <vector>

#include "core/host/check.h"
#include "core/tensorrt/registry.h"

namespace anybit {

// The node's attributes, the same names as GemmAttributes of op_spec.py; TensorRT hands
// them over as plugin fields.
struct GemmAttributes {
  int32_t wbits, levels, abits, act_symmetric, group_size, in_features, out_features, has_bias;
  float norm_epsilon;  // of the RMSNorm of X; 0 = no norm

  int32_t n_groups() const { return group_size != 0 ? in_features / group_size : 1; }
  int32_t group_len() const { return group_size != 0 ? group_size : in_features; }
  int32_t planes() const {
    int32_t count = 0;
    while ((1 << count) < levels) ++count;
    return count;
  }
};

// An input behind X: where it goes in GemmBuffers, and the exact type and shape it must have.
enum class Slot { kWeight, kScale, kZero, kScaleGroup, kBias, kGamma };
struct InputSpec {
  const char* name;
  Slot slot;
  nvinfer1::DataType type;  // kGamma has X's instead; of kZero, kFLOAT says minimums
  std::vector<int64_t> dims;
};

// What differs between the ops beside their kernels, which anybit_ops() has under the same name.
// `check` logs its reason and returns false for attributes the op cannot run.
struct GemmOp {
  const char* name;  // ONNX op_type and plugin name
  bool (*check)(const GemmAttributes& attributes, const std::string& where);
  // without X, bias and gamma, which every op has
  std::vector<InputSpec> (*inputs)(const GemmAttributes& attributes);
};

class GemmCreator final : public nvinfer1::IPluginCreatorV3One {
 public:
  explicit GemmCreator(const GemmOp& op);

  nvinfer1::IPluginV3* createPlugin(const char* name, const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase phase) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &fields_; }
  const char* getPluginName() const noexcept override { return op_.name; }
  const char* getPluginVersion() const noexcept override;
  const char* getPluginNamespace() const noexcept override;

 private:
  const GemmOp& op_;
  std::vector<nvinfer1::PluginField> field_list_;
  nvinfer1::PluginFieldCollection fields_;
  Registration registration_;
};

}  // namespace anybit
