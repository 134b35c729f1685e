// The IPluginV3 overrides that every low-bit GEMM plugin shares.
//
// Attributes are validated when the plugin is made, shapes when TensorRT configures it; enqueue
// trusts both and only flattens the leading dimensions of X into M tokens.
#include "core/tensorrt/plugin_base.h"

#include "core/host/config.h"

#include <algorithm>
#include <array>
#include <limits>
#include <memory>

namespace anybit {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorFormat;

constexpr const char* kNamespace = "anybit";
constexpr const char* kVersion = "1";
constexpr const char* kExportAgain = "Export the model again with this version";
constexpr int32_t kError = 1;
constexpr int kOldDriver = 35;  // cudaErrorInsufficientDriver
constexpr int64_t kTooMany = -1;
// every op's inputs begin with X, weight, scale; scale is [out_features, ...]
constexpr int kScaleInput = 2;

struct NamedAttribute {
  const char* name;
  int32_t GemmAttributes::* member;
};
constexpr std::array<NamedAttribute, 8> kAttributes{{
    {"wbits", &GemmAttributes::wbits},
    {"levels", &GemmAttributes::levels},
    {"abits", &GemmAttributes::abits},
    {"act_symmetric", &GemmAttributes::act_symmetric},
    {"group_size", &GemmAttributes::group_size},
    {"in_features", &GemmAttributes::in_features},
    {"out_features", &GemmAttributes::out_features},
    {"has_bias", &GemmAttributes::has_bias},
}};
constexpr const char* kNormEpsilon = "norm_epsilon";  // a float, the last field

bool is_activation_type(DataType type) {
  return type == DataType::kHALF || type == DataType::kBF16 || type == DataType::kFLOAT;
}

int32_t dtype_of(DataType type) {
  return type == DataType::kHALF ? kFloat16 : type == DataType::kBF16 ? kBFloat16 : kFloat32;
}

std::string text_of(const Dims& dims) {
  std::string text = "[";
  for (int32_t i = 0; i < dims.nbDims; ++i)
    text += (i != 0 ? ", " : "") + std::to_string(dims.d[i]);
  return text + "]";
}

// Product of all dimensions but the last; kTooMany beyond int32 or when one is unknown.
int64_t tokens_of(const Dims& dims) {
  int64_t count = 1;
  for (int32_t i = 0; i + 1 < dims.nbDims; ++i) {
    if (dims.d[i] == 0) return 0;
    if (dims.d[i] < 0 || count > std::numeric_limits<int32_t>::max() / dims.d[i]) return kTooMany;
    count *= dims.d[i];
  }
  return count;
}

bool same_dims(const Dims& got, const std::vector<int64_t>& expected) {
  if (got.nbDims != static_cast<int32_t>(expected.size())) return false;
  for (int32_t i = 0; i < got.nbDims; ++i) {
    if (got.d[i] != expected[i]) return false;
  }
  return true;
}

Dims dims_of(const std::vector<int64_t>& sizes) {
  Dims dims{};
  dims.nbDims = static_cast<int32_t>(sizes.size());
  for (size_t i = 0; i < sizes.size(); ++i) dims.d[i] = sizes[i];
  return dims;
}

class GemmPlugin final : public nvinfer1::IPluginV3,
                         public nvinfer1::IPluginV3OneCore,
                         public nvinfer1::IPluginV3OneBuild,
                         public nvinfer1::IPluginV3OneRuntime {
 public:
  GemmPlugin(const GemmOp& op, const GemmAttributes& attributes, std::string where)
      : op_(op), attributes_(attributes), inputs_(op.inputs(attributes)), where_(std::move(where)) {
    const GemmAttributes& a = attributes;
    if (a.has_bias != 0)
      inputs_.push_back({"bias", Slot::kBias, DataType::kFLOAT, {a.out_features}});
    if (a.norm_epsilon > 0)
      inputs_.push_back({"gamma", Slot::kGamma, DataType::kFLOAT, {a.in_features}});
    metadata_ =
        format("%s W%d(%d levels)A%d group %d K %d N %d%s", op.name, a.wbits, a.levels, a.abits,
               a.group_size, a.in_features, a.out_features, a.norm_epsilon > 0 ? " norm" : "");
  }

  // ---- IPluginV3 ----
  nvinfer1::IPluginCapability* getCapabilityInterface(
      nvinfer1::PluginCapabilityType kind) noexcept override {
    switch (kind) {
      case nvinfer1::PluginCapabilityType::kCORE:
        return static_cast<nvinfer1::IPluginV3OneCore*>(this);
      case nvinfer1::PluginCapabilityType::kBUILD:
        return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
      case nvinfer1::PluginCapabilityType::kRUNTIME:
        return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }
  nvinfer1::IPluginV3* clone() noexcept override {
    try {
      auto* copy = new GemmPlugin(op_, attributes_, where_);
      copy->tactics_ = tactics_;
      copy->tactic_ = tactic_;
      return copy;
    } catch (const std::exception&) {
      return nullptr;
    }
  }

  // ---- core ----
  const char* getPluginName() const noexcept override { return op_.name; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

  // ---- build ----
  int32_t getNbOutputs() const noexcept override { return 1; }

  int32_t getOutputDataTypes(DataType* out, int32_t, const DataType* in,
                             int32_t) const noexcept override {
    out[0] = in[0];
    return 0;
  }

  int32_t getOutputShapes(const nvinfer1::DimsExprs* in, int32_t input_count,
                          const nvinfer1::DimsExprs*, int32_t, nvinfer1::DimsExprs* out, int32_t,
                          nvinfer1::IExprBuilder&) noexcept override {
    const int32_t expected = static_cast<int32_t>(inputs_.size()) + 1;
    if (input_count != expected) {
      fail(where_, format("got %d inputs, expected %d", input_count, expected), kExportAgain);
      return kError;
    }
    const int32_t scale_rank = static_cast<int32_t>(inputs_[kScaleInput - 1].dims.size());
    if (in[0].nbDims < 1 || in[kScaleInput].nbDims != scale_rank) {
      fail(where_,
           format("got X of rank %d and scale of rank %d, expected at least 1 and %d", in[0].nbDims,
                  in[kScaleInput].nbDims, scale_rank),
           kExportAgain);
      return kError;
    }
    out[0] = in[0];
    // out_features, which configurePlugin verifies
    out[0].d[in[0].nbDims - 1] = in[kScaleInput].d[0];
    return 0;
  }

  bool supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors,
                                 int32_t input_count, int32_t) noexcept override {
    const PluginTensorDesc& tensor = tensors[position].desc;
    if (tensor.format != TensorFormat::kLINEAR) return false;
    if (position == 0) return is_activation_type(tensor.type);
    // Y, listed after the inputs
    if (position == input_count) return tensor.type == tensors[0].desc.type;
    if (position > static_cast<int32_t>(inputs_.size())) return false;
    const InputSpec& input = inputs_[position - 1];
    return tensor.type == (input.slot == Slot::kGamma ? tensors[0].desc.type : input.type);
  }

  int32_t configurePlugin(const DynamicPluginTensorDesc* in, int32_t,
                          const DynamicPluginTensorDesc*, int32_t) noexcept override {
    if (!check_x(in[0].desc.dims) || !check_x(in[0].max)) return kError;
    for (size_t i = 0; i < inputs_.size(); ++i) {
      const Dims& got = in[i + 1].desc.dims;
      if (same_dims(got, inputs_[i].dims)) continue;
      fail(where_ + " input " + inputs_[i].name,
           "got shape " + text_of(got) + ", expected " + text_of(dims_of(inputs_[i].dims)),
           "The weights do not fit the node's attributes: export the model again");
      return kError;
    }
    list_tactics(in[0]);
    return 0;
  }

  size_t getWorkspaceSize(const DynamicPluginTensorDesc* in, int32_t,
                          const DynamicPluginTensorDesc*, int32_t) const noexcept override {
    const GemmShape shape = shape_of(tokens_of(in[0].max), in[0].desc.type, kAnyTactic);
    return op_.workspace(&shape);
  }

  // TensorRT times these on the GPU it builds for, at the profile's optimal shape. Without a GPU
  // there are none, and the kernel is chosen at run time.
  int32_t getNbTactics() noexcept override { return static_cast<int32_t>(tactics_.size()); }
  int32_t getValidTactics(int32_t* tactics, int32_t count) noexcept override {
    for (int32_t i = 0; i < count && i < getNbTactics(); ++i) tactics[i] = tactics_[i];
    return 0;
  }

  // Timings of tactics may be kept for layers of the same attributes.
  const char* getTimingCacheID() noexcept override { return metadata_.c_str(); }
  const char* getMetadataString() noexcept override { return metadata_.c_str(); }

  // ---- run time ----
  int32_t setTactic(int32_t tactic) noexcept override {
    tactic_ = tactic;
    return 0;
  }

  int32_t onShapeChange(const PluginTensorDesc* in, int32_t, const PluginTensorDesc*,
                        int32_t) noexcept override {
    return check_x(in[0].dims) ? 0 : kError;
  }

  int32_t enqueue(const PluginTensorDesc* in_desc, const PluginTensorDesc*, const void* const* in,
                  void* const* out, void* workspace, cudaStream_t stream) noexcept override {
    const int64_t tokens = tokens_of(in_desc[0].dims);
    if (tokens == kTooMany) return kError;  // beyond every profile that configurePlugin took
    const GemmShape shape = shape_of(tokens, in_desc[0].type, tactic_);
    GemmBuffers buffers{};
    buffers.x = in[0];
    buffers.y = out[0];
    buffers.workspace = workspace;
    for (size_t i = 0; i < inputs_.size(); ++i) bind(buffers, inputs_[i].slot, in[i + 1]);
    const int status = op_.run(&shape, &buffers, stream);
    if (status != 0) {
      fail(where_, format("got CUDA error %d for %d tokens, expected success", status, shape.m),
           status == kOldDriver ? "The driver is older than the CUDA version the plugin library "
                                  "was built with: update it"
                                : "Check that the plugin library was built for this GPU (python -m "
                                  "plugins build --arch ...)");
    }
    return status;
  }

  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override {
    return clone();
  }

  const PluginFieldCollection* getFieldsToSerialize() noexcept override {
    for (size_t i = 0; i < kAttributes.size(); ++i) {
      serialized_[i] = {kAttributes[i].name, &(attributes_.*kAttributes[i].member),
                        PluginFieldType::kINT32, 1};
    }
    serialized_.back() = {kNormEpsilon, &attributes_.norm_epsilon, PluginFieldType::kFLOAT32, 1};
    collection_ = {static_cast<int32_t>(serialized_.size()), serialized_.data()};
    return &collection_;
  }

 private:
  bool check_x(const Dims& dims) const {
    if (dims.nbDims < 1 ||
        (dims.d[dims.nbDims - 1] >= 0 && dims.d[dims.nbDims - 1] != attributes_.in_features)) {
      return fail(where_ + " input X",
                  format("got shape %s, expected [..., %d]", text_of(dims).c_str(),
                         attributes_.in_features),
                  "Feed a tensor whose last dimension is in_features");
    }
    for (int32_t i = 0; i + 1 < dims.nbDims; ++i) {
      if (dims.d[i] < 0) return true;  // dynamic: the profile's largest shape is checked instead
    }
    if (tokens_of(dims) != kTooMany) return true;
    return fail(where_ + " input X",
                "got shape " + text_of(dims) + ", expected fewer than 2^31 tokens",
                "Lower the batch or the sequence length");
  }

  // A tactic stays for every number of tokens of the profile. Where the smallest and the
  // largest would choose different kernels, a choice at each run is better than any of
  // them, and none is offered.
  void list_tactics(const DynamicPluginTensorDesc& x) {
    const auto kernel = [&](const Dims& dims) {
      const GemmShape shape = shape_of(tokens_of(dims), x.desc.type, 0);
      int32_t first = 0;
      op_.tactics(&shape, &first, 1);
      return config_from_tactic(first).kernel;
    };
    tactics_.clear();
    if (kernel(x.min) != kernel(x.max)) return;
    const std::vector<int32_t> most = tactics_for(x.max, x.desc.type);
    for (const int32_t tactic : tactics_for(x.opt, x.desc.type)) {
      const auto same = [&](int32_t other) {
        return config_from_tactic(other).kernel == config_from_tactic(tactic).kernel;
      };
      if (std::any_of(most.begin(), most.end(), same)) tactics_.push_back(tactic);
    }
  }

  std::vector<int32_t> tactics_for(const Dims& dims, DataType type) const {
    const GemmShape shape = shape_of(tokens_of(dims), type, 0);
    std::vector<int32_t> tactics(static_cast<size_t>(op_.tactics(&shape, nullptr, 0)));
    op_.tactics(&shape, tactics.data(), static_cast<int>(tactics.size()));
    return tactics;
  }

  GemmShape shape_of(int64_t tokens, DataType type, int32_t tactic) const {
    const GemmAttributes& a = attributes_;
    const int32_t m = tokens == kTooMany ? 0 : static_cast<int32_t>(tokens);
    return {m,        a.out_features, a.in_features,   a.group_size,   a.planes(), a.wbits,
            a.levels, a.abits,        a.act_symmetric, dtype_of(type), tactic,     a.norm_epsilon};
  }

  static void bind(GemmBuffers& buffers, Slot slot, const void* data) {
    switch (slot) {
      case Slot::kWeight: buffers.weight = static_cast<const int32_t*>(data); break;
      case Slot::kScale: buffers.scale = static_cast<const float*>(data); break;
      case Slot::kZero: buffers.zero = static_cast<const int32_t*>(data); break;
      case Slot::kScaleGroup: buffers.scale_group = data; break;
      case Slot::kBias: buffers.bias = static_cast<const float*>(data); break;
      case Slot::kGamma: buffers.gamma = data; break;
    }
  }

  const GemmOp& op_;
  GemmAttributes attributes_;
  std::vector<InputSpec> inputs_;  // behind X, in the node's order
  std::string where_;
  std::string metadata_;
  std::vector<int32_t> tactics_;  // as of the last configurePlugin
  int32_t tactic_ = 0;            // 0: the kernel is chosen at run time
  std::array<PluginField, kAttributes.size() + 1> serialized_;
  PluginFieldCollection collection_{};
};

const PluginField* find_field(const PluginFieldCollection& fields, const char* name) {
  for (int32_t i = 0; i < fields.nbFields; ++i) {
    if (fields.fields[i].name != nullptr && std::string(fields.fields[i].name) == name)
      return &fields.fields[i];
  }
  return nullptr;
}

bool fail_field(const PluginField& field, const std::string& where, const std::string& expected) {
  return fail(
      where,
      format("got %d values of field type %d, ", field.length, static_cast<int>(field.type)) +
          expected,
      kExportAgain);
}

// One attribute from TensorRT's fields; ONNX integers arrive as int32 or as int64.
bool read_attribute(const PluginFieldCollection& fields, const NamedAttribute& attribute,
                    const std::string& where, GemmAttributes& result) {
  const std::string expected = format("expected one integer in attribute '%s'", attribute.name);
  const PluginField* field = find_field(fields, attribute.name);
  if (field == nullptr) return fail(where, "got none, " + expected, kExportAgain);
  const bool wide = field->type == PluginFieldType::kINT64;
  if (field->data == nullptr || field->length != 1 ||
      (!wide && field->type != PluginFieldType::kINT32))
    return fail_field(*field, where, expected);
  const int64_t value =
      wide ? *static_cast<const int64_t*>(field->data) : *static_cast<const int32_t*>(field->data);
  result.*attribute.member = static_cast<int32_t>(value);
  if (result.*attribute.member == value) return true;
  return fail(where,
              format("got %s %lld, expected a 32-bit integer", attribute.name,
                     static_cast<long long>(value)),
              kExportAgain);
}

// The epsilon of the norm; files of earlier versions have none, and no norm.
bool read_norm(const PluginFieldCollection& fields, const std::string& where, float& epsilon) {
  const PluginField* field = find_field(fields, kNormEpsilon);
  if (field == nullptr) return true;
  if (field->data == nullptr || field->length != 1 || field->type != PluginFieldType::kFLOAT32)
    return fail_field(*field, where, format("expected one float in attribute '%s'", kNormEpsilon));
  epsilon = *static_cast<const float*>(field->data);
  if (epsilon >= 0 && epsilon <= std::numeric_limits<float>::max()) return true;
  return fail(where,
              format("got %s %g, expected 0 (no norm) or a positive number", kNormEpsilon, epsilon),
              kExportAgain);
}

bool in_range(const std::string& where, const char* name, int64_t value, int64_t low,
              int64_t high) {
  if (low <= value && value <= high) return true;
  return fail(where,
              format("got %s %lld, expected %lld to %lld", name, static_cast<long long>(value),
                     static_cast<long long>(low), static_cast<long long>(high)),
              "Export the model again with settings in range");
}

// What holds for every op; op.check then adds its own limits.
bool check_attributes(const GemmAttributes& a, const std::string& where) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  if (!in_range(where, "in_features", a.in_features, 1, kMost) ||
      !in_range(where, "out_features", a.out_features, 1, kMost) ||
      !in_range(where, "wbits", a.wbits, 1, 8) || !in_range(where, "levels", a.levels, 2, 256) ||
      !in_range(where, "abits", a.abits, 2, 16) ||
      !in_range(where, "act_symmetric", a.act_symmetric, 0, 1) ||
      !in_range(where, "has_bias", a.has_bias, 0, 1) ||
      !in_range(where, "group_size", a.group_size, 0, a.in_features)) {
    return false;
  }
  if (a.group_size == 0 || a.in_features % a.group_size == 0) return true;
  return fail(where,
              format("got group_size %d, expected a divisor of in_features %d", a.group_size,
                     a.in_features),
              "Choose a --group-size that divides every layer's input size");
}

}  // namespace

GemmCreator::GemmCreator(const GemmOp& op) : op_(op), registration_(*this) {
  for (const NamedAttribute& attribute : kAttributes) {
    field_list_.emplace_back(attribute.name, nullptr, PluginFieldType::kINT32, 1);
  }
  field_list_.emplace_back(kNormEpsilon, nullptr, PluginFieldType::kFLOAT32, 1);
  fields_ = {static_cast<int32_t>(field_list_.size()), field_list_.data()};
}

const char* GemmCreator::getPluginVersion() const noexcept { return kVersion; }

const char* GemmCreator::getPluginNamespace() const noexcept { return kNamespace; }

nvinfer1::IPluginV3* GemmCreator::createPlugin(const char* name,
                                               const PluginFieldCollection* fields,
                                               nvinfer1::TensorRTPhase) noexcept {
  try {
    const std::string where = format("%s '%s'", op_.name, name != nullptr ? name : "");
    const PluginFieldCollection given = fields != nullptr ? *fields : PluginFieldCollection{};
    GemmAttributes attributes{};
    for (const NamedAttribute& attribute : kAttributes) {
      if (!read_attribute(given, attribute, where, attributes)) return nullptr;
    }
    if (!read_norm(given, where, attributes.norm_epsilon)) return nullptr;
    if (!check_attributes(attributes, where) || !op_.check(attributes, where)) return nullptr;
    return new GemmPlugin(op_, attributes, where);
  } catch (const std::exception& error) {
    trt::log(trt::Severity::kError, error.what());
    return nullptr;
  }
}

}  // namespace anybit
