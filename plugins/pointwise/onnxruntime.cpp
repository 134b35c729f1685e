// ResidualSum, Activation, RMSNorm and RotatedHeads as ONNX Runtime custom ops: shapes are checked at
// each run, since most are the sequences'.
#include <cstring>

#include "core/onnxruntime/call.h"
#include "core/onnxruntime/custom_op.h"
#include "pointwise/cpu/pointwise.h"

namespace anybit::ort {
namespace {

constexpr const char* kDomainOfRows = "anybit_pointwise";

// What the ops share. Their first inputs are of the model's type; those behind them are checked where
// they are read.
template <class Kernel>
struct PointwiseOp : CustomOp {
  int type;

  explicit PointwiseOp(int of_the_model) : CustomOp{}, type(of_the_model) {
    declare_kernel<Kernel>(*this);
    GetName = [](const CustomOp*) { return Kernel::kName; };
    GetInputType = [](const CustomOp* self, size_t i) -> int {
      return i < Kernel::kRequired ? static_cast<const PointwiseOp*>(self)->type : kUndefined;
    };
    GetInputTypeCount = [](const CustomOp*) { return std::size(Kernel::kInputs); };
    GetOutputType = [](const CustomOp* self, size_t) {
      return static_cast<const PointwiseOp*>(self)->type;
    };
    GetOutputTypeCount = [](const CustomOp*) { return Kernel::kOutputs; };
    GetInputCharacteristic = [](const CustomOp*, size_t i) -> int {
      return i < Kernel::kRequired ? ort::kRequired : kOptional;
    };
  }
};

float float_of(const OrtKernelInfo* info, const char* name) {
  float value = 0;
  ask(Function::kKernelInfoGetAttributeFloat, info, name, &value);
  return value;
}

int32_t integer_of(const OrtKernelInfo* info, const char* name) {
  int64_t value = 0;
  ask(Function::kKernelInfoGetAttributeInt64, info, name, &value);
  return static_cast<int32_t>(value);
}

// [..., width] as rows.
RowsShape rows_of(const Tensor& tensor, int type) {
  RowsShape shape{1, 1, dtype_of(type)};
  if (tensor.rank > 0) shape.width = tensor.dims[tensor.rank - 1];
  for (size_t i = 0; i + 1 < tensor.rank; ++i) shape.rows *= tensor.dims[i];
  return shape;
}

void check(int error, const char* op) {
  if (error != 0)
    fail(op, "got sizes that no kernel takes, expected those of an exported model", kExportAgain);
}

class ResidualSum {
 public:
  static constexpr const char* kName = "ResidualSum";
  static constexpr const char* kInputs[] = {"stream", "value"};
  static constexpr size_t kRequired = 2, kOutputs = 1;

  ResidualSum(const PointwiseOp<ResidualSum>& op, const OrtKernelInfo* info)
      : type_(op.type),
        inputs_(info, kName, kInputs, std::size(kInputs)),
        multiplier_(float_of(info, "multiplier")) {
    ++kernels_made;
  }

  void compute(OrtKernelContext* context) const {
    const Call call{inputs_, context};
    const Tensor stream = call.read(0, type_);
    const RowsShape shape = rows_of(stream, type_);
    const SumBuffers b{stream.data, call.input(1, type_, stream), call.output(0, stream)};
    const Threads threads(context);
    const cpu::Parallel parallel = threads.parallel();
    const int error = anybit_residual_sum(&shape, multiplier_, &b, -1, &parallel);
    threads.check();
    check(error, kName);
  }

 private:
  int type_;
  Inputs inputs_;
  float multiplier_;
};

class Activation {
 public:
  static constexpr const char* kName = "Activation";
  static constexpr const char* kInputs[] = {"x"};
  static constexpr size_t kRequired = 1, kOutputs = 1;

  Activation(const PointwiseOp<Activation>& op, const OrtKernelInfo* info)
      : type_(op.type),
        inputs_(info, kName, kInputs, std::size(kInputs)),
        gated_(integer_of(info, "gated") != 0),
        kind_(kind_of(info)) {
    ++kernels_made;
  }

  void compute(OrtKernelContext* context) const {
    const Call call{inputs_, context};
    const Tensor x = call.read(0, type_);
    Dims dims = x;
    RowsShape shape = rows_of(x, type_);
    if (dims.rank == 0 || (gated_ && dims.back() % 2))
      call.refuse(0, x, gated_ ? "[..., an even number]" : "[..., width]");
    if (gated_) shape.width = dims.back() /= 2;
    const ActivationBuffers b{x.data, call.output(0, dims)};
    const Threads threads(context);
    const cpu::Parallel parallel = threads.parallel();
    const int error = anybit_activation(&shape, kind_, gated_, &b, -1, &parallel);
    threads.check();
    check(error, kName);
  }

 private:
  static int32_t kind_of(const OrtKernelInfo* info) {
    constexpr const char* kKinds[kActivationKinds] = {"silu", "gelu_tanh", "relu2"};
    char name[64] = {};
    size_t size = sizeof name;
    ask(Function::kKernelInfoGetAttributeString, info, "activation", name, &size);
    for (int32_t kind = 0; kind < kActivationKinds; ++kind) {
      if (std::strcmp(name, kKinds[kind]) == 0) return kind;
    }
    fail(kName, std::string("got activation ") + name + ", expected silu, gelu_tanh or relu2",
         "Use the library of the version that exported the model, or export the model again");
  }

  int type_;
  Inputs inputs_;
  bool gated_;
  int32_t kind_;
};

class RMSNorm {
 public:
  static constexpr const char* kName = "RMSNorm";
  static constexpr const char* kInputs[] = {"x", "gain"};
  static constexpr size_t kRequired = 2, kOutputs = 1;

  RMSNorm(const PointwiseOp<RMSNorm>& op, const OrtKernelInfo* info)
      : type_(op.type),
        inputs_(info, kName, kInputs, std::size(kInputs)),
        epsilon_(float_of(info, "epsilon")) {
    ++kernels_made;
  }

  void compute(OrtKernelContext* context) const {
    const Call call{inputs_, context};
    const Tensor x = call.read(0, type_);
    if (x.rank == 0) call.refuse(0, x, "[..., width]");
    const RowsShape shape = rows_of(x, type_);
    const NormBuffers b{x.data, call.input(1, type_, {shape.width}), call.output(0, x)};
    const Threads threads(context);
    const cpu::Parallel parallel = threads.parallel();
    const int error = anybit_rms_norm(&shape, epsilon_, &b, -1, &parallel);
    threads.check();
    check(error, kName);
  }

 private:
  int type_;
  Inputs inputs_;
  float epsilon_;
};

class RotatedHeads {
 public:
  static constexpr const char* kName = "RotatedHeads";
  // cos, sin and position_ids where channels turn, then the gains where there is a norm; inputs that
  // are not there leave no gap.
  static constexpr const char* kInputs[] = {"qkv",          "cos",        "sin",
                                            "position_ids", "query_gain", "key_gain"};
  static constexpr const char* kWithoutRotation[] = {"qkv", "query_gain", "key_gain"};
  static constexpr size_t kRequired = 1, kOutputs = 3;

  RotatedHeads(const PointwiseOp<RotatedHeads>& op, const OrtKernelInfo* info)
      : type_(op.type), inputs_(inputs_of(info)) {
    shape_.heads = integer_of(info, "heads");
    shape_.kv_heads = integer_of(info, "kv_heads");
    shape_.head_dim = integer_of(info, "head_dim");
    shape_.rotary = integer_of(info, "rotary");
    shape_.norm = integer_of(info, "norm");
    shape_.query_epsilon = float_of(info, "query_epsilon");
    shape_.key_epsilon = float_of(info, "key_epsilon");
    shape_.dtype = dtype_of(op.type);
    check_attributes(shape_);
    ++kernels_made;
  }

  void compute(OrtKernelContext* context) const {
    const bool rotates = shape_.rotary != 0;
    const Call call{inputs_, context};
    HeadsShape s = shape_;
    HeadsBuffers b{};
    const Tensor qkv = call.read(0, type_);
    const int64_t width = int64_t{s.heads + 2 * s.kv_heads} * s.head_dim;
    if (qkv.rank != 3 || qkv.dims[2] != width)
      call.refuse(0, qkv, "[batch, tokens, " + std::to_string(width) + "]");
    s.batch = call.size(qkv.dims[0]), s.tokens = call.size(qkv.dims[1]);
    b.qkv = qkv.data;
    if (rotates) {
      const Tensor cos = call.read(1, type_);
      if (cos.rank != 2) call.refuse(1, cos, "[positions, channels]");
      s.positions = call.size(cos.dims[0]);
      const Dims table{s.positions, s.rotary / 2};
      b.cos = call.data(1, cos, table), b.sin = call.input(2, type_, table);
      b.position_ids = static_cast<const int64_t*>(call.input(3, kInt64, {s.batch, s.tokens}));
      check_positions(s, b.position_ids, call);
    }
    if (s.norm != kNoNorm) {
      const size_t first = rotates ? 4 : 1;
      const auto gain = [&](size_t i, int32_t heads) {
        return call.input(i, type_, {int64_t{s.norm == kAllHeads ? heads : 1} * s.head_dim});
      };
      b.query_gain = gain(first, s.heads), b.key_gain = gain(first + 1, s.kv_heads);
    }
    b.query = call.output(0, {s.batch, s.heads, s.tokens, s.head_dim});
    b.key = call.output(1, {s.batch, s.kv_heads, s.tokens, s.head_dim});
    b.value = call.output(2, {s.batch, s.kv_heads, s.tokens, s.head_dim});
    const Threads threads(context);
    const cpu::Parallel parallel = threads.parallel();
    const int error = anybit_rotated_heads(&s, &b, -1, &parallel);
    threads.check();
    check(error, kName);
  }

 private:
  static Inputs inputs_of(const OrtKernelInfo* info) {
    if (integer_of(info, "rotary") != 0) return {info, kName, kInputs, std::size(kInputs)};
    return {info, kName, kWithoutRotation, std::size(kWithoutRotation)};
  }

  static void check_attributes(const HeadsShape& s) {
    constexpr int32_t kMostHeads = 1 << 20;  // so that a token's numbers are counted in 32 bits
    const bool counts =
        s.heads > 0 && s.heads <= kMostHeads && s.kv_heads > 0 && s.kv_heads <= kMostHeads;
    const bool dim = s.head_dim > 0 && s.head_dim <= cpu::kMostHeadDim;
    const bool turned = s.rotary >= 0 && s.rotary <= s.head_dim && s.rotary % 2 == 0;
    if (counts && dim && turned && s.norm >= kNoNorm && s.norm < kHeadNormKinds) return;
    fail(kName,
         "got heads " + std::to_string(s.heads) + ", kv_heads " + std::to_string(s.kv_heads) +
             ", head_dim " + std::to_string(s.head_dim) + ", rotary " + std::to_string(s.rotary) +
             ", norm " + std::to_string(s.norm) + ", expected some heads of 1 to " +
             std::to_string(cpu::kMostHeadDim) +
             " channels, of which an even number turns, and a norm of 0 to " +
             std::to_string(kHeadNormKinds - 1),
         "Run the file without this library, or export the model again");
  }

  static void check_positions(const HeadsShape& s, const int64_t* positions, const Call& call) {
    for (int64_t i = 0; i < int64_t{s.batch} * s.tokens; ++i) {
      if (positions[i] < 0 || positions[i] >= s.positions)
        fail(call.where(3),
             "got position " + std::to_string(positions[i]) + ", expected 0 to " +
                 std::to_string(s.positions - 1),
             "Feed fewer tokens, or start a new sequence");
    }
  }

  int type_;
  Inputs inputs_;
  HeadsShape shape_{};
};

template <class Kernel>
void declare(int type) {
  add_declaration(kDomainOfRows, std::make_shared<PointwiseOp<Kernel>>(type));
}

struct Registration {
  Registration() {
    for (const int type : {int{kFloat}, int{kHalf}, int{ort::kBFloat16}}) {
      declare<ResidualSum>(type);
      declare<Activation>(type);
      declare<RMSNorm>(type);
      declare<RotatedHeads>(type);
    }
  }
};
const Registration registration;

}  // namespace
}  // namespace anybit::ort
