// CachedAttention as an ONNX Runtime custom op: shapes are checked at each run, since all of them are
// the sequences'.
#include <limits>

#include "cached_attention/cpu/attention.h"
#include "core/onnxruntime/context.h"
#include "core/onnxruntime/custom_op.h"

namespace anybit::ort {
namespace {

enum Input : size_t { kQuery, kKey, kValue, kPastKey, kPastValue, kMask, kWriteIndices, kInputs };
enum Output : size_t { kContext, kPresentKey, kPresentValue, kOutputs };
constexpr const char* kNames[kInputs] = {"query",      "key",  "value",        "past_key",
                                         "past_value", "mask", "write_indices"};

struct AttentionOp : CustomOp {
  int type;  // of queries, keys and values
};

class AttentionKernel {
 public:
  AttentionKernel(int type, const OrtKernelInfo* info) : type_(type) {
    ask(Function::kKernelInfoGetAttributeFloat, info, "scale", &shape_.scale);
    ask(Function::kKernelInfoGetAttributeFloat, info, "softcap", &shape_.softcap);
    shape_.dtype = dtype_of(type);
    ++kernels_made;
  }

  void compute(OrtKernelContext* context) const {
    const OrtKernelContext* inputs = context;
    size_t count = 0;
    ask(Function::kKernelContextGetInputCount, inputs, &count);
    AttentionShape s = shape_;
    s.static_cache = count > kWriteIndices && value_of(inputs, kWriteIndices) != nullptr;
    const void* data[kInputs] = {};
    Tensor query = read(inputs, kQuery, type_, data);
    if (query.rank != 4) refuse(kQuery, query, "[batch, heads, tokens, head_dim]");
    const Tensor past = read(inputs, kPastKey, type_, data);
    if (past.rank != 4) refuse(kPastKey, past, "[batch, kv_heads, tokens, head_dim]");
    s.batch = size(query.dims[0]), s.heads = size(query.dims[1]);
    s.tokens = size(query.dims[2]), s.head_dim = size(query.dims[3]);
    s.kv_heads = size(past.dims[1]), s.past = size(past.dims[2]);
    const int64_t total = s.static_cache ? s.past : int64_t{s.past} + s.tokens;
    expect(inputs, kKey, type_, {s.batch, s.kv_heads, s.tokens, s.head_dim}, data);
    expect(inputs, kValue, type_, {s.batch, s.kv_heads, s.tokens, s.head_dim}, data);
    expect(inputs, kPastKey, type_, {s.batch, s.kv_heads, s.past, s.head_dim}, data);
    expect(inputs, kPastValue, type_, {s.batch, s.kv_heads, s.past, s.head_dim}, data);
    const Tensor mask = read(inputs, kMask, kBool, data);
    s.masks = mask.rank > 0 && mask.dims[0] == 1 ? 1 : s.batch;
    expect(inputs, kMask, kBool, {s.masks, 1, s.tokens, total}, data);
    if (s.static_cache) {
      expect(inputs, kWriteIndices, kInt64, {s.batch}, data);
      check_places(s, static_cast<const int64_t*>(data[kWriteIndices]));
    }
    AttentionBuffers b{};
    b.query = data[kQuery], b.key = data[kKey], b.value = data[kValue];
    b.past_key = data[kPastKey], b.past_value = data[kPastValue];
    b.mask = static_cast<const uint8_t*>(data[kMask]);
    b.write_indices = static_cast<const int64_t*>(data[kWriteIndices]);
    b.context = output(context, kContext, {s.batch, s.tokens, int64_t{s.heads} * s.head_dim});
    const std::vector<int64_t> cache{s.batch, s.kv_heads, total, s.head_dim};
    b.present_key = output(context, kPresentKey, cache);
    b.present_value = output(context, kPresentValue, cache);
    const Threads threads(context);
    const cpu::Parallel parallel = threads.parallel();
    const int error = anybit_attention(&s, &b, -1, &parallel);
    threads.check();
    if (error == cpu::kNoMemory) throw std::bad_alloc();
    if (error != 0)
      fail(where(),
           "got " + std::to_string(s.heads) + " heads of " + std::to_string(s.head_dim) + " over " +
               std::to_string(s.kv_heads) + " heads of keys, expected a multiple, of at most 1024",
           kExportAgain);
  }

 private:
  static std::string where() { return "CachedAttention"; }
  static std::string where(Input input) { return where() + " input " + kNames[input]; }

  [[noreturn]] static void refuse(Input input, const Tensor& got, const std::string& expected) {
    fail(where(input),
         std::string("got ") + name_of(got.type) + " " + got.text() + ", expected " + expected,
         "Feed tensors that fit each other");
  }

  static int32_t size(int64_t dim) {
    if (dim > std::numeric_limits<int32_t>::max() / 2)
      fail(where(), "got a dimension of " + std::to_string(dim) + ", expected fewer than 2^30",
           "Lower the batch or the sequence length");
    return static_cast<int32_t>(dim);
  }

  static const OrtValue* value_of(const OrtKernelContext* inputs, Input input) {
    const OrtValue* value = nullptr;
    ask(Function::kKernelContextGetInput, inputs, size_t{input}, &value);
    return value;
  }

  static Tensor read(const OrtKernelContext* inputs, Input input, int type, const void** data) {
    const OrtValue* value = value_of(inputs, input);
    if (value == nullptr) fail(where(input), "got nothing, expected a tensor", kExportAgain);
    const Tensor found = describe(value, where(input));
    if (found.type != type) refuse(input, found, name_of(type));
    data[input] = data_of(value);
    return found;
  }

  static void expect(const OrtKernelContext* inputs, Input input, int type,
                     const std::vector<int64_t>& dims, const void** data) {
    const Tensor found = read(inputs, input, type, data);
    bool same = found.rank == dims.size();
    for (size_t i = 0; same && i < dims.size(); ++i) same = found.dims[i] == dims[i];
    if (!same) refuse(input, found, name_of(type) + (" " + text_of(dims)));
  }

  static void check_places(const AttentionShape& s, const int64_t* places) {
    for (int32_t i = 0; i < s.batch; ++i) {
      if (places[i] < 0 || places[i] > s.past - s.tokens)
        fail(where(kWriteIndices),
             "got " + std::to_string(places[i]) + " for sequence " + std::to_string(i) + " and " +
                 std::to_string(s.tokens) + " new tokens, expected 0 to " +
                 std::to_string(s.past - s.tokens) + " in a cache of " + std::to_string(s.past),
             "Feed fewer tokens, or start a new sequence");
    }
  }

  static void* output(OrtKernelContext* context, Output index, const std::vector<int64_t>& dims) {
    OrtValue* value = nullptr;
    ask(Function::kKernelContextGetOutput, context, size_t{index}, dims.data(), dims.size(),
        &value);
    return data_of(value);
  }

  int type_;
  AttentionShape shape_{};
};

const AttentionOp& of(const CustomOp* op) { return *static_cast<const AttentionOp*>(op); }

AttentionOp declare(int type) {
  AttentionOp d{};
  d.type = type;
  d.version = kApiVersion;
  d.GetName = [](const CustomOp*) { return "CachedAttention"; };
  d.GetExecutionProviderType = [](const CustomOp*) -> const char* { return nullptr; };
  d.GetInputType = [](const CustomOp* self, size_t i) -> int {
    return i == kMask ? int{kBool} : i == kWriteIndices ? int{kInt64} : of(self).type;
  };
  d.GetInputTypeCount = [](const CustomOp*) { return size_t{kInputs}; };
  d.GetOutputType = [](const CustomOp* self, size_t) { return of(self).type; };
  d.GetOutputTypeCount = [](const CustomOp*) { return size_t{kOutputs}; };
  d.GetInputCharacteristic = [](const CustomOp*, size_t i) -> int {
    return i < kWriteIndices ? kRequired : kOptional;
  };
  d.GetOutputCharacteristic = [](const CustomOp*, size_t) -> int { return kRequired; };
  d.GetInputMemoryType = [](const CustomOp*, size_t) { return 0; };
  d.GetVariadicInputMinArity = d.GetVariadicOutputMinArity = [](const CustomOp*) { return 1; };
  d.GetVariadicInputHomogeneity =
      d.GetVariadicOutputHomogeneity = [](const CustomOp*) { return 0; };
  d.CreateKernelV2 = [](const CustomOp* self, const void* const*, const OrtKernelInfo* info,
                        void** kernel) {
    return guarded([&] { *kernel = new AttentionKernel(of(self).type, info); });
  };
  d.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    return guarded([&] { static_cast<const AttentionKernel*>(kernel)->compute(context); });
  };
  d.KernelDestroy = [](void* kernel) { delete static_cast<AttentionKernel*>(kernel); };
  d.GetStartVersion = [](const CustomOp*) { return 1; };
  d.GetEndVersion = [](const CustomOp*) { return std::numeric_limits<int>::max(); };
  return d;
}

struct Registration {
  Registration() {
    for (const int type : {int{kFloat}, int{kHalf}, int{ort::kBFloat16}})
      add_declaration("anybit_attention", std::make_unique<AttentionOp>(declare(type)));
  }
};
const Registration registration;

}  // namespace
}  // namespace anybit::ort
