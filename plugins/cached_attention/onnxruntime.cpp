// CachedAttention and LowBitAttention as ONNX Runtime custom ops: shapes are checked at each run, since
// they are the sequences'.
#include "cached_attention/cpu/attention.h"
#include "core/onnxruntime/call.h"
#include "core/onnxruntime/custom_op.h"

namespace anybit::ort {
namespace {

// The last input is of a static cache only.
constexpr const char* kInputs[] = {"query",      "key",  "value",        "past_key",
                                   "past_value", "mask", "write_indices"};
constexpr const char* kLowBitInputs[] = {
    "query",        "key",  "value",          "past_key",
    "past_value",   "mask", "past_key_scale", "past_value_scale",
    "write_indices"};
enum Input : size_t { kQuery, kKey, kValue, kPastKey, kPastValue, kMask, kPastKeyScale };
enum Output : size_t { kContext, kPresentKey, kPresentValue, kPresentKeyScale, kPresentValueScale };

struct AttentionOp : CustomOp {
  int type;  // of queries, keys and values
  bool low_bits;

  const char* name() const { return low_bits ? "LowBitAttention" : "CachedAttention"; }
  size_t inputs() const { return low_bits ? std::size(kLowBitInputs) : std::size(kInputs); }
  size_t write_indices() const { return inputs() - 1; }
  const char* const* input_names() const { return low_bits ? kLowBitInputs : kInputs; }
  int input_type(size_t i) const {
    if (i == write_indices()) return kInt64;
    if (i == kMask) return kBool;
    if (i >= kPastKeyScale) return kFloat;
    return low_bits && (i == kPastKey || i == kPastValue) ? int{kInt8} : type;
  }
  size_t outputs() const { return low_bits ? 5 : 3; }
  int output_type(size_t i) const {
    if (i >= kPresentKeyScale) return kFloat;
    return low_bits && i != kContext ? int{kInt8} : type;
  }
};

class AttentionKernel {
 public:
  AttentionKernel(const AttentionOp& op, const OrtKernelInfo* info)
      : op_(op), inputs_(info, op.name(), op.input_names(), op.inputs()) {
    ask(Function::kKernelInfoGetAttributeFloat, info, "scale", &shape_.scale);
    ask(Function::kKernelInfoGetAttributeFloat, info, "softcap", &shape_.softcap);
    shape_.dtype = dtype_of(op.type);
    shape_.bits = 16;
    ++kernels_made;
    if (!op.low_bits) return;
    int64_t bits = 0;
    ask(Function::kKernelInfoGetAttributeInt64, info, "bits", &bits);
    if (bits < 2 || bits > 8)
      fail(op.name(), "got bits " + std::to_string(bits) + ", expected 2 to 8", kExportAgain);
    shape_.bits = static_cast<int32_t>(bits);
  }

  void compute(OrtKernelContext* context) const {
    const Call call{inputs_, context};
    const auto input = [&](size_t i, const Dims& dims) {
      return call.input(i, op_.input_type(i), dims);
    };
    AttentionShape s = shape_;
    s.static_cache =
        call.input_count() > op_.write_indices() && call.value(op_.write_indices()) != nullptr;
    const Tensor query = call.read(kQuery, op_.input_type(kQuery));
    const Tensor past = call.read(kPastKey, op_.input_type(kPastKey));
    if (query.rank != 4) call.refuse(kQuery, query, "[batch, heads, tokens, head_dim]");
    if (past.rank != 4) call.refuse(kPastKey, past, "[batch, kv_heads, tokens, row]");
    s.batch = call.size(query.dims[0]), s.heads = call.size(query.dims[1]);
    s.tokens = call.size(query.dims[2]), s.head_dim = call.size(query.dims[3]);
    s.kv_heads = call.size(past.dims[1]), s.past = call.size(past.dims[2]);
    const int64_t total = s.static_cache ? s.past : int64_t{s.past} + s.tokens;
    const int64_t row = s.low_bits() ? int64_t{s.bits} * s.head_dim / 8 : s.head_dim;
    const Tensor mask = call.read(kMask, kBool);
    s.masks = mask.rank > 0 && mask.dims[0] == 1 ? 1 : s.batch;

    AttentionBuffers b{};
    const auto cache = [&](int64_t rows, int64_t width) {
      return Dims{s.batch, s.kv_heads, rows, width};
    };
    b.query = query.data;
    b.key = input(kKey, cache(s.tokens, s.head_dim));
    b.value = input(kValue, cache(s.tokens, s.head_dim));
    b.past_key = call.data(kPastKey, past, cache(s.past, row));
    b.past_value = input(kPastValue, cache(s.past, row));
    const Dims seen{s.masks, 1, s.tokens, total};
    b.mask = static_cast<const uint8_t*>(call.data(kMask, mask, seen));
    if (s.low_bits()) {
      b.past_key_scale = static_cast<const float*>(input(kPastKeyScale, cache(s.past, 2)));
      b.past_value_scale = static_cast<const float*>(input(kPastKeyScale + 1, cache(s.past, 2)));
    }
    if (s.static_cache) {
      b.write_indices = static_cast<const int64_t*>(input(op_.write_indices(), {s.batch}));
      check_places(s, b.write_indices, call, op_.write_indices());
    }
    b.context = call.output(kContext, {s.batch, s.tokens, int64_t{s.heads} * s.head_dim});
    b.present_key = call.output(kPresentKey, cache(total, row));
    b.present_value = call.output(kPresentValue, cache(total, row));
    if (s.low_bits()) {
      b.present_key_scale = static_cast<float*>(call.output(kPresentKeyScale, cache(total, 2)));
      b.present_value_scale = static_cast<float*>(call.output(kPresentValueScale, cache(total, 2)));
    }
    const Threads threads(context);
    const cpu::Parallel parallel = threads.parallel();
    const int error = anybit_attention(&s, &b, -1, &parallel);
    threads.check();
    if (error == cpu::kNoMemory) throw std::bad_alloc();
    if (error != 0)
      fail(op_.name(),
           "got " + std::to_string(s.heads) + " heads of " + std::to_string(s.head_dim) +
               " numbers over " + std::to_string(s.kv_heads) +
               " heads of keys, expected a multiple, and at most 1024 numbers (with a cache of few "
               "bits a multiple of 8)",
           kExportAgain);
  }

 private:
  static void check_places(const AttentionShape& s, const int64_t* places, const Call& call,
                           size_t input) {
    for (int32_t i = 0; i < s.batch; ++i) {
      if (places[i] < 0 || places[i] > s.past - s.tokens)
        fail(call.where(input),
             "got " + std::to_string(places[i]) + " for sequence " + std::to_string(i) + " and " +
                 std::to_string(s.tokens) + " new tokens, expected 0 to " +
                 std::to_string(s.past - s.tokens) + " in a cache of " + std::to_string(s.past),
             "Feed fewer tokens, or start a new sequence");
    }
  }

  const AttentionOp& op_;
  Inputs inputs_;
  AttentionShape shape_{};
};

const AttentionOp& of(const CustomOp* op) { return *static_cast<const AttentionOp*>(op); }

std::unique_ptr<const AttentionOp> declared(int type, bool low_bits) {
  auto made = std::make_unique<AttentionOp>();
  AttentionOp& d = *made;
  d.type = type;
  d.low_bits = low_bits;
  declare_kernel<AttentionKernel>(d);
  d.GetName = [](const CustomOp* self) { return of(self).name(); };
  d.GetInputType = [](const CustomOp* self, size_t i) { return of(self).input_type(i); };
  d.GetInputTypeCount = [](const CustomOp* self) { return of(self).inputs(); };
  d.GetOutputType = [](const CustomOp* self, size_t i) { return of(self).output_type(i); };
  d.GetOutputTypeCount = [](const CustomOp* self) { return of(self).outputs(); };
  d.GetInputCharacteristic = [](const CustomOp* self, size_t i) -> int {
    return i < of(self).write_indices() ? kRequired : kOptional;
  };
  return made;
}

struct Registration {
  Registration() {
    for (const bool low_bits : {false, true}) {
      for (const int type : {int{kFloat}, int{kHalf}, int{ort::kBFloat16}})
        add_declaration("anybit_attention", declared(type, low_bits));
    }
  }
};
const Registration registration;

}  // namespace
}  // namespace anybit::ort
