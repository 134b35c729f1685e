// The IPluginV3 overrides that every low-bit GEMM plugin shares.
//
// Attributes are validated when the plugin is made, shapes when TensorRT configures it; enqueue
// trusts both and only flattens the leading dimensions of X into M tokens.
#include "core/tensorrt/plugin_base.h"

#include "core/host/config.h"
#include "core/host/ops.h"

#include <algorithm>
#include <array>
#include <limits>
#include <memory>
#include <optional>
#include <variant>

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
constexpr const char* kBuildAgain = "Build it again: python -m plugins build";
constexpr const char* kExportAgain = "Export the model again with this version";
constexpr const char* kSettingsInRange = "Export the model again with settings in range";
constexpr int32_t kOk = 0;
constexpr int32_t kError = 1;
constexpr int kOldDriver = 35;  // cudaErrorInsufficientDriver
constexpr int64_t kTooMany = -1;

// Positions among a node's inputs: every op's begin with X, weight, scale [out_features, ...].
constexpr int32_t kX = 0;
constexpr int32_t kScale = 2;

// An attribute of the node, which TensorRT hands over as a plugin field.
struct Field {
  const char* name;
  std::variant<int32_t GemmAttributes::*, float GemmAttributes::*> member;
  double least, most;
  enum Presence { kRequired, kOptional } presence = kRequired;  // optional: 0 where it is missing
};

constexpr double kMostInteger = std::numeric_limits<int32_t>::max();
constexpr std::array<Field, 9> kFields{{
    {"wbits", &GemmAttributes::wbits, 1, 8},
    {"levels", &GemmAttributes::levels, 2, 256},
    {"abits", &GemmAttributes::abits, 2, 16},
    {"act_symmetric", &GemmAttributes::act_symmetric, 0, 1},
    {"group_size", &GemmAttributes::group_size, 0, kMostInteger},
    {"in_features", &GemmAttributes::in_features, 1, kMostInteger},
    {"out_features", &GemmAttributes::out_features, 1, kMostInteger},
    {"has_bias", &GemmAttributes::has_bias, 0, 1},
    // Files of earlier versions have none, and no norm.
    {"norm_epsilon", &GemmAttributes::norm_epsilon, 0, std::numeric_limits<float>::max(),
     Field::kOptional},
}};

constexpr PluginFieldType field_type(const int32_t&) { return PluginFieldType::kINT32; }
constexpr PluginFieldType field_type(const float&) { return PluginFieldType::kFLOAT32; }

// Every attribute as a plugin field that points at its value in `attributes`.
std::array<PluginField, kFields.size()> plugin_fields(const GemmAttributes& attributes) {
  std::array<PluginField, kFields.size()> list;
  for (size_t i = 0; i < kFields.size(); ++i) {
    const auto point_at = [&](auto member) {
      const auto& value = attributes.*member;
      list[i] = {kFields[i].name, &value, field_type(value), 1};
    };
    std::visit(point_at, kFields[i].member);
  }
  return list;
}

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
  GemmPlugin(const GemmOp& op, const AnybitOp& kernels, const GemmAttributes& attributes,
             std::string where)
      : op_(op),
        kernels_(kernels),
        attributes_(attributes),
        inputs_(op.inputs(attributes)),
        where_(std::move(where)) {
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
      auto* copy = new GemmPlugin(op_, kernels_, attributes_, where_);
      copy->tactics_ = tactics_;
      copy->tactic_ = tactic_;
      copy->has_minimum_ = has_minimum_;
      copy->network_type_ = network_type_;
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
                             int32_t given) const noexcept override {
    out[0] = in[kX];
    const int32_t position = zero_position();
    if (position != kX && position < given) network_type_ = in[position];
    return kOk;
  }

  int32_t getOutputShapes(const nvinfer1::DimsExprs* in, int32_t given, const nvinfer1::DimsExprs*,
                          int32_t, nvinfer1::DimsExprs* out, int32_t,
                          nvinfer1::IExprBuilder&) noexcept override {
    if (given != input_count()) {
      fail(where_, format("got %d inputs, expected %d", given, input_count()), kExportAgain);
      return kError;
    }
    const nvinfer1::DimsExprs &x = in[kX], &scale = in[kScale];
    const int32_t scale_rank = static_cast<int32_t>(spec_of(kScale).dims.size());
    if (x.nbDims < 1 || scale.nbDims != scale_rank) {
      const std::string problem =
          format("got X of rank %d and scale of rank %d, expected at least 1 and %d", x.nbDims,
                 scale.nbDims, scale_rank);
      fail(where_, problem, kExportAgain);
      return kError;
    }
    nvinfer1::DimsExprs& y = out[0];
    y = x;
    y.d[y.nbDims - 1] = scale.d[0];  // out_features, which configurePlugin verifies
    return kOk;
  }

  bool supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors,
                                 int32_t given, int32_t) noexcept override {
    const PluginTensorDesc& tensor = tensors[position].desc;
    const DataType x_type = tensors[kX].desc.type;
    if (tensor.format != TensorFormat::kLINEAR) return false;
    if (position == kX) return is_activation_type(tensor.type);
    if (position == given) return tensor.type == x_type;  // Y, listed after the inputs
    if (position >= input_count()) return false;
    const InputSpec& input = spec_of(position);
    if (input.slot == Slot::kZero && network_type_)
      return tensor.type == (*network_type_ == input.type ? input.type : DataType::kFLOAT);
    if (input.slot == Slot::kZero && tensor.type == DataType::kFLOAT) return true;
    return tensor.type == (input.slot == Slot::kGamma ? x_type : input.type);
  }

  int32_t configurePlugin(const DynamicPluginTensorDesc* in, int32_t,
                          const DynamicPluginTensorDesc*, int32_t) noexcept override {
    if (!check_x(in[kX].desc.dims) || !check_x(in[kX].max)) return kError;
    look_for_minimum([&](int32_t position) { return in[position].desc.type; });
    for (int32_t position = kX + 1; position < input_count(); ++position) {
      const InputSpec& input = spec_of(position);
      const Dims& got = in[position].desc.dims;
      if (same_dims(got, input.dims)) continue;
      fail(where_ + " input " + input.name,
           "got shape " + text_of(got) + ", expected " + text_of(dims_of(input.dims)),
           "The weights do not fit the node's attributes: export the model again");
      return kError;
    }
    list_tactics(in[kX]);
    return kOk;
  }

  size_t getWorkspaceSize(const DynamicPluginTensorDesc* in, int32_t,
                          const DynamicPluginTensorDesc*, int32_t) const noexcept override {
    const GemmShape shape = shape_of(tokens_of(in[kX].max), in[kX].desc.type, kAnyTactic);
    return kernels_.workspace(&shape);
  }

  // TensorRT times these on the GPU it builds for, at the profile's optimal shape. Without a GPU
  // there are none, and the kernel is chosen at run time.
  int32_t getNbTactics() noexcept override { return static_cast<int32_t>(tactics_.size()); }
  int32_t getValidTactics(int32_t* tactics, int32_t count) noexcept override {
    for (int32_t i = 0; i < count && i < getNbTactics(); ++i) tactics[i] = tactics_[i];
    return kOk;
  }

  // Timings of tactics may be kept for layers of the same attributes.
  const char* getTimingCacheID() noexcept override { return metadata_.c_str(); }
  const char* getMetadataString() noexcept override { return metadata_.c_str(); }

  // ---- run time ----
  int32_t setTactic(int32_t tactic) noexcept override {
    tactic_ = tactic;
    return kOk;
  }

  int32_t onShapeChange(const PluginTensorDesc* in, int32_t, const PluginTensorDesc*,
                        int32_t) noexcept override {
    look_for_minimum([&](int32_t position) { return in[position].type; });
    return check_x(in[kX].dims) ? kOk : kError;
  }

  int32_t enqueue(const PluginTensorDesc* in_desc, const PluginTensorDesc*, const void* const* in,
                  void* const* out, void* workspace, cudaStream_t stream) noexcept override {
    const int64_t tokens = tokens_of(in_desc[kX].dims);
    if (tokens == kTooMany) return kError;  // beyond every profile that configurePlugin took
    const GemmShape shape = shape_of(tokens, in_desc[kX].type, tactic_);
    GemmBuffers buffers{};
    buffers.x = in[kX];
    buffers.y = out[0];
    buffers.workspace = workspace;
    for (int32_t position = kX + 1; position < input_count(); ++position) {
      bind(buffers, spec_of(position).slot, in[position]);
    }
    const int status = kernels_.run(&shape, &buffers, stream);
    if (status == kOk) return kOk;
    fail(where_, format("got CUDA error %d for %d tokens, expected success", status, shape.m),
         status == kOldDriver ? "The driver is older than the CUDA version the plugin library was "
                                "built with: update it"
                              : "Check that the plugin library was built for this GPU (python -m "
                                "plugins build --arch ...)");
    return status;
  }

  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override {
    return clone();
  }

  const PluginFieldCollection* getFieldsToSerialize() noexcept override {
    serialized_ = plugin_fields(attributes_);
    collection_ = {static_cast<int32_t>(serialized_.size()), serialized_.data()};
    return &collection_;
  }

 private:
  int32_t input_count() const { return static_cast<int32_t>(inputs_.size()) + 1; }  // with X
  // What the input at `position`, behind X, must be.
  const InputSpec& spec_of(int32_t position) const {
    return inputs_[static_cast<size_t>(position - kX - 1)];
  }

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
      kernels_.tactics(&shape, &first, 1);
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
    std::vector<int32_t> tactics(static_cast<size_t>(kernels_.tactics(&shape, nullptr, 0)));
    kernels_.tactics(&shape, tactics.data(), static_cast<int>(tactics.size()));
    return tactics;
  }

  GemmShape shape_of(int64_t tokens, DataType type, int32_t tactic) const {
    GemmShape shape{};
    shape.m = tokens == kTooMany ? 0 : static_cast<int32_t>(tokens);
    shape.n = attributes_.out_features;
    shape.k = attributes_.in_features;
    shape.group_size = attributes_.group_size;
    shape.planes = attributes_.planes();
    shape.wbits = attributes_.wbits;
    shape.levels = attributes_.levels;
    shape.abits = attributes_.abits;
    shape.act_symmetric = attributes_.act_symmetric;
    shape.dtype = dtype_of(type);
    shape.tactic = tactic;
    shape.norm_epsilon = attributes_.norm_epsilon;
    shape.has_minimum = has_minimum_ ? 1 : 0;
    return shape;
  }

  // The node's attribute has_minimum is not asked for: TensorRT's parser warns of every node that
  // lacks a plugin's field, and the type of the input says the same.
  template <class TypeOf>
  void look_for_minimum(TypeOf type_of) {
    if (zero_position() != kX) has_minimum_ = type_of(zero_position()) == DataType::kFLOAT;
  }

  // Where the zero points or minimums are; kX where the op has none.
  int32_t zero_position() const {
    for (int32_t position = kX + 1; position < input_count(); ++position) {
      if (spec_of(position).slot == Slot::kZero) return position;
    }
    return kX;
  }

  void bind(GemmBuffers& buffers, Slot slot, const void* data) const {
    switch (slot) {
      case Slot::kWeight: buffers.weight = static_cast<const int32_t*>(data); break;
      case Slot::kScale: buffers.scale = static_cast<const float*>(data); break;
      case Slot::kZero:
        if (has_minimum_) buffers.minimum = static_cast<const float*>(data);
        else buffers.zero = static_cast<const int32_t*>(data);
        break;
      case Slot::kScaleGroup: buffers.scale_group = data; break;
      case Slot::kBias: buffers.bias = static_cast<const float*>(data); break;
      case Slot::kGamma: buffers.gamma = data; break;
    }
  }

  const GemmOp& op_;
  const AnybitOp& kernels_;
  GemmAttributes attributes_;
  std::vector<InputSpec> inputs_;  // behind X, in the node's order
  std::string where_;
  std::string metadata_;
  std::vector<int32_t> tactics_;  // as of the last configurePlugin
  int32_t tactic_ = 0;            // 0: the kernel is chosen at run time
  bool has_minimum_ = false;      // as of the last look_for_minimum
  // Of the zero points or minimums in the network, as far as TensorRT has told. Were another type
  // offered, it could convert integers to floats on the way, and zero points would pass for minimums.
  mutable std::optional<DataType> network_type_;
  std::array<PluginField, kFields.size()> serialized_;
  PluginFieldCollection collection_{};
};

const PluginField* find_field(const PluginFieldCollection& fields, const char* name) {
  for (int32_t i = 0; i < fields.nbFields; ++i) {
    if (fields.fields[i].name != nullptr && std::string(fields.fields[i].name) == name)
      return &fields.fields[i];
  }
  return nullptr;
}

// An int32; ONNX integers arrive as int32 or as int64.
bool read_value(const PluginField& from, const Field& field, const std::string& where,
                int32_t& value) {
  const bool wide = from.type == PluginFieldType::kINT64;
  if (from.data == nullptr || from.length != 1 || (!wide && from.type != PluginFieldType::kINT32)) {
    return fail(where,
                format("got %d values of field type %d, expected one integer in attribute '%s'",
                       from.length, static_cast<int>(from.type), field.name),
                kExportAgain);
  }
  const int64_t given =
      wide ? *static_cast<const int64_t*>(from.data) : *static_cast<const int32_t*>(from.data);
  value = static_cast<int32_t>(given);
  if (value != given) {
    return fail(
        where,
        format("got %s %lld, expected a 32-bit integer", field.name, static_cast<long long>(given)),
        kExportAgain);
  }
  if (field.least <= value && value <= field.most) return true;
  return fail(
      where, format("got %s %d, expected %.0f to %.0f", field.name, value, field.least, field.most),
      kSettingsInRange);
}

// A float that is a setting only where it is positive.
bool read_value(const PluginField& from, const Field& field, const std::string& where,
                float& value) {
  if (from.data == nullptr || from.length != 1 || from.type != PluginFieldType::kFLOAT32) {
    return fail(where,
                format("got %d values of field type %d, expected one float in attribute '%s'",
                       from.length, static_cast<int>(from.type), field.name),
                kExportAgain);
  }
  value = *static_cast<const float*>(from.data);
  if (field.least <= value && value <= field.most) return true;
  return fail(where,
              format("got %s %g, expected 0 (no norm) or a positive number", field.name, value),
              kExportAgain);
}

// One attribute out of TensorRT's fields.
bool read_field(const PluginFieldCollection& given, const Field& field, const std::string& where,
                GemmAttributes& attributes) {
  if (const PluginField* from = find_field(given, field.name)) {
    return std::visit(
        [&](auto member) { return read_value(*from, field, where, attributes.*member); },
        field.member);
  }
  if (field.presence == Field::kOptional) return true;
  return fail(where, format("got none, expected one integer in attribute '%s'", field.name),
              kExportAgain);
}

// What holds for every op beside the ranges of kFields; op.check then adds its own limits.
bool check_attributes(const GemmAttributes& a, const std::string& where) {
  if (a.group_size == 0 || a.in_features % a.group_size == 0) return true;
  return fail(where,
              format("got group_size %d, expected a divisor of in_features %d", a.group_size,
                     a.in_features),
              "Choose a --group-size that divides every layer's input size");
}

}  // namespace

GemmCreator::GemmCreator(const GemmOp& op) : op_(op), registration_(*this) {
  for (const PluginField& field : plugin_fields({})) {
    field_list_.emplace_back(field.name, nullptr, field.type, field.length);
  }
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
    const AnybitOp* kernels = find_op(op_.name);
    if (kernels == nullptr) {
      fail(where, "got no kernels of that name in the library, expected some", kBuildAgain);
      return nullptr;
    }
    GemmAttributes attributes{};
    for (const Field& field : kFields) {
      if (!read_field(given, field, where, attributes)) return nullptr;
    }
    if (!check_attributes(attributes, where) || !op_.check(attributes, where)) return nullptr;
    return new GemmPlugin(op_, *kernels, attributes, where);
  } catch (const std::exception& error) {
    trt::log(trt::Severity::kError, error.what());
    return nullptr;
  }
}

}  // namespace anybit
