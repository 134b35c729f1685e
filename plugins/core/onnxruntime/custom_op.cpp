// The custom ops of the library: attributes and constant inputs are checked when a kernel is made,
// X at each run. No exception leaves a function that ONNX Runtime calls.
#include "core/onnxruntime/custom_op.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <limits>
#include <memory>
#include <new>
#include <string>

#define ANYBIT_SET plain  // the instructions that every processor has
#include "core/cpu/floats.h"
#include "core/cpu/isa.h"
#include "core/host/ops.h"
#include "core/onnxruntime/context.h"

namespace anybit::ort {
namespace {

constexpr size_t kX = 0;
constexpr size_t kOptionalInputs = 3;

// Scratch memory of the thread that runs a node; it grows to what the largest node needs.
struct Scratch {
  void* memory = nullptr;
  size_t bytes = 0;
  ~Scratch() { std::free(memory); }

  void* at_least(size_t wanted) {
    if (wanted > bytes) {
      std::free(memory);
      bytes = 0;
      memory = std::aligned_alloc(64, (wanted + 63) / 64 * 64);
      if (memory == nullptr) throw std::bad_alloc();
      bytes = wanted;
    }
    return memory;
  }
};

// One of ONNX Runtime's threads may run many nodes, of several sessions.
void* scratch(size_t bytes) {
  static thread_local Scratch own;
  return own.at_least(bytes);
}

struct Declaration : CustomOp {
  const GemmOp* op;
  int x_type;
};

class GemmKernel {
 public:
  GemmKernel(const Declaration& declaration, const OrtKernelInfo* info)
      : kernels_(find_op(declaration.op->name)) {
    read_attributes(declaration, info);
    where_ = std::string(declaration.op->name) + " K " + std::to_string(shape_.k) + " N " +
             std::to_string(shape_.n);
    if (kernels_ == nullptr || kernels_->workspace(&shape_) == 0)
      fail(where_,
           "got wbits " + std::to_string(shape_.wbits) + ", levels " +
               std::to_string(shape_.levels) + ", abits " + std::to_string(shape_.abits) +
               ", act_symmetric " + std::to_string(shape_.act_symmetric) + ", group_size " +
               std::to_string(shape_.group_size) + ", norm_epsilon " +
               std::to_string(shape_.norm_epsilon) + (shape_.has_minimum ? ", has_minimum 1" : "") +
               ", expected a combination that the op's README lists",
           kExportAgain);
    ++kernels_made;
    inputs_ = declaration.op->inputs(shape_);
    if (has_bias_)
      inputs_.push_back(
          {"bias",
           [](GemmBuffers& b, const void* p) { b.bias = static_cast<const float*>(p); },
           kFloat,
           {shape_.n}});
    if (shape_.norm_epsilon > 0)
      inputs_.push_back({"gamma",
                         [](GemmBuffers& b, const void* p) { b.gamma = p; },
                         static_cast<ElementType>(declaration.x_type),
                         {shape_.k}});
    for (size_t i = 0; i < inputs_.size(); ++i) {
      halves_.emplace_back();
      const OrtValue* value = constant_input(info, i + 1);
      constant_.push_back(value != nullptr);
      if (value == nullptr) continue;
      const Tensor got = described(value, inputs_[i].name);
      if (is_widened(inputs_[i], got)) {
        halves_.back() = halves_of(inputs_[i], got);
        inputs_[i].bind(constants_, halves_[i].data());
      } else {
        inputs_[i].bind(constants_, checked_data(inputs_[i], got));
      }
    }
  }

  void compute(OrtKernelContext* context) const {
    const OrtKernelContext* inputs = context;
    size_t given = 0;
    ask(Function::kKernelContextGetInputCount, inputs, &given);
    if (given < inputs_.size() + 1)
      fail(where_,
           "got " + std::to_string(given) + " inputs, expected " +
               std::to_string(inputs_.size() + 1),
           kExportAgain);
    GemmBuffers buffers = constants_;
    for (size_t i = 0; i < inputs_.size(); ++i) {
      if (constant_[i]) continue;
      inputs_[i].bind(buffers, checked_data(inputs_[i], input(inputs, i + 1, inputs_[i].name)));
    }
    const Tensor x = input(inputs, kX, "X");
    GemmShape shape = shape_;
    shape.m = tokens_of(x);
    buffers.x = x.data;
    Dims dims = x;
    dims.back() = shape.n;
    OrtValue* y = nullptr;
    const int64_t* y_dims = dims.dims.data();
    ask(Function::kKernelContextGetOutput, context, size_t{0}, y_dims, dims.rank, &y);
    if (shape.m == 0) return;
    buffers.y = data_of(y);
    buffers.workspace = scratch(kernels_->workspace(&shape));
    run(shape, buffers, context);
  }

 private:
  void read_attributes(const Declaration& declaration, const OrtKernelInfo* info) {
    const std::string where = declaration.op->name;
    const auto integer = [&](const char* name, int64_t most, bool optional = false) {
      int64_t value = 0;
      OrtStatus* status =
          call<OrtStatus*>(Function::kKernelInfoGetAttributeInt64, info, name, &value);
      if (status != nullptr) {
        call<void>(Function::kReleaseStatus, status);
        if (optional) return 0;
        fail(where, std::string("got no attribute ") + name + ", expected an integer",
             kExportAgain);
      }
      if (value < 0 || value > most)
        fail(where,
             std::string("got ") + name + " " + std::to_string(value) + ", expected 0 to " +
                 std::to_string(most),
             kExportAgain);
      return static_cast<int32_t>(value);
    };
    check_version(where, info);
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
    shape_.k = integer("in_features", kMost);
    shape_.n = integer("out_features", kMost);
    shape_.group_size = integer("group_size", kMost);
    shape_.wbits = integer("wbits", 8);
    shape_.levels = integer("levels", 256);
    shape_.abits = integer("abits", 16);
    shape_.act_symmetric = integer("act_symmetric", 1);
    has_bias_ = integer("has_bias", 1) != 0;
    shape_.has_minimum = integer("has_minimum", 1, true);  // written only where it is 1
    while ((1 << shape_.planes) < shape_.levels) ++shape_.planes;
    shape_.dtype = dtype_of(declaration.x_type);
    // Files of earlier versions have none, and no norm.
    OrtStatus* status = call<OrtStatus*>(Function::kKernelInfoGetAttributeFloat, info,
                                         "norm_epsilon", &shape_.norm_epsilon);
    if (status != nullptr) {
      call<void>(Function::kReleaseStatus, status);
      shape_.norm_epsilon = 0;
    }
  }

  // The layout of the weights and what the attributes mean are those of a version of the op.
  static void check_version(const std::string& where, const OrtKernelInfo* info) {
    std::string version(64, '\0');
    size_t size = version.size();
    ask(Function::kKernelInfoGetAttributeString, info, "plugin_version", version.data(), &size);
    version.resize(std::strlen(version.c_str()));
    if (version != kPluginVersion)
      fail(where,
           "got plugin_version " + version + ", expected " + kPluginVersion +
               ", which this library of kernels runs",
           "Use the library of the version that exported the model, or export the model again");
  }

  Tensor described(const OrtValue* value, const char* name) const {
    return describe(value, [&] { return where_ + " input " + name; });
  }

  Tensor input(const OrtKernelContext* context, size_t index, const char* name) const {
    const OrtValue* value = nullptr;
    ask(Function::kKernelContextGetInput, context, index, &value);
    if (value == nullptr)
      fail(where_ + " input " + name, "got nothing, expected a tensor", kExportAgain);
    return described(value, name);
  }

  [[noreturn]] void refuse(const InputSpec& spec, const Tensor& got) const {
    fail(where_ + " input " + spec.name,
         std::string("got ") + name_of(got.type) + " " + got.text() + ", expected " +
             name_of(spec.type) + " " + spec.dims.text(),
         "The weights do not fit the node's attributes: export the model again");
  }

  const void* checked_data(const InputSpec& spec, const Tensor& got) const {
    if (got.type != spec.type || !(got == spec.dims)) refuse(spec, got);
    return got.data;
  }

  // Of a 16-bit node among others that it computes in fp32, ONNX Runtime makes the op's fp32 form,
  // and fp32 of all its fp16 constants.
  bool is_widened(const InputSpec& spec, const Tensor& got) const {
    return spec.type == kHalf && shape_.dtype == kFloat32 && got.type == kFloat && got == spec.dims;
  }

  // What they were; numbers that were not fp16 are refused.
  std::vector<cpu::plain::Half> halves_of(const InputSpec& spec, const Tensor& got) const {
    size_t count = 1;
    for (size_t i = 0; i < spec.dims.rank; ++i) count *= static_cast<size_t>(spec.dims.dims[i]);
    std::vector<cpu::plain::Half> halves(count);
    const float* wide = static_cast<const float*>(got.data);
    for (size_t i = 0; i < count; ++i) {
      cpu::plain::round_to(wide[i], halves[i]);
      if (cpu::plain::float_from(halves[i]) != wide[i]) refuse(spec, got);
    }
    return halves;
  }

  int32_t tokens_of(const Tensor& x) const {
    const auto refuse = [&](const std::string& expected, const char* fix) {
      fail(where_ + " input X", "got shape " + x.text() + ", expected " + expected, fix);
    };
    if (x.rank < 1 || x.dims[x.rank - 1] != shape_.k)
      refuse("[..., " + std::to_string(shape_.k) + "]",
             "Feed a tensor whose last dimension is in_features");
    int64_t count = 1;
    for (size_t i = 0; i + 1 < x.rank; ++i) {
      if (x.dims[i] != 0 && count > std::numeric_limits<int32_t>::max() / x.dims[i])
        refuse("fewer than 2^31 tokens", "Lower the batch or the sequence length");
      count *= x.dims[i];
    }
    return static_cast<int32_t>(count);
  }

  void run(const GemmShape& shape, const GemmBuffers& buffers, OrtKernelContext* context) const {
    const Threads threads(context);
    cpu::Parallel parallel = threads.parallel();
    const int error = kernels_->run(&shape, &buffers, &parallel);
    threads.check();
    if (error != 0)
      fail(where_,
           "got error " + std::to_string(error) + " for " + std::to_string(shape.m) +
               " tokens, expected none",
           "Build the library again: python -m plugins build");
  }

  const AnybitOp* kernels_;
  GemmShape shape_{};
  bool has_bias_ = false;
  std::string where_;
  std::vector<InputSpec> inputs_;
  // Inputs that are the same in every run are checked and bound when the kernel is made.
  std::vector<bool> constant_;
  GemmBuffers constants_{};
  std::vector<std::vector<cpu::plain::Half>>
      halves_;  // what is given of an input in place of its data
};

const Declaration& of(const CustomOp* op) { return *static_cast<const Declaration*>(op); }

Declaration declare(const GemmOp& op, int x_type) {
  Declaration d{};
  d.op = &op;
  d.x_type = x_type;
  declare_kernel<GemmKernel>(d);
  d.GetName = [](const CustomOp* self) { return of(self).op->name; };
  d.GetInputType = [](const CustomOp* self, size_t i) -> int {
    if (i == kX) return of(self).x_type;
    return i < of(self).op->required.size() ? of(self).op->required[i] : kUndefined;
  };
  d.GetInputTypeCount = [](const CustomOp* self) {
    return of(self).op->required.size() + kOptionalInputs;
  };
  d.GetOutputType = [](const CustomOp* self, size_t) { return of(self).x_type; };
  d.GetOutputTypeCount = [](const CustomOp*) -> size_t { return 1; };
  d.GetInputCharacteristic = [](const CustomOp* self, size_t i) -> int {
    return i < of(self).op->required.size() ? kRequired : kOptional;
  };
  return d;
}

struct Declared {
  const char* domain;
  std::shared_ptr<const CustomOp> op;  // ONNX Runtime keeps the address
};

// A function's static, so that it exists before the first registration whatever the order of the
// op folders.
std::vector<Declared>& declarations() {
  static std::vector<Declared> list;
  return list;
}

// What sessions refer to as long as they live.
struct Domains {
  std::vector<OrtCustomOpDomain*> list;
  std::deque<std::string> names;  // which must outlive them
};

// All domains, made at the first registration. They are never deleted: a session may end after the
// statics of this library.
const std::vector<OrtCustomOpDomain*>& domains() {
  static const Domains& all = *[] {
    auto made = std::make_unique<Domains>();
    std::vector<std::string> bases;
    for (const Declared& declared : declarations()) {
      if (std::find(bases.begin(), bases.end(), declared.domain) == bases.end())
        bases.push_back(declared.domain);
    }
    for (const std::string& base : bases) {
      // A model has a domain for each scheme of an op (exporter/graph/nodes.py).
      for (int number = 0; number < kDomains; ++number) {
        made->names.push_back(number == 0 ? base : base + ".v" + std::to_string(number));
        OrtCustomOpDomain* domain = nullptr;
        ask(Function::kCreateCustomOpDomain, made->names.back().c_str(), &domain);
        for (const Declared& declared : declarations()) {
          if (declared.domain == base) ask(Function::kCustomOpDomainAdd, domain, declared.op.get());
        }
        made->list.push_back(domain);
      }
    }
    return made.release();
  }();
  return all.list;
}

}  // namespace

GemmRegistration::GemmRegistration(const GemmOp& op) {
  for (const int type : {int{kFloat}, int{kHalf}, int{ort::kBFloat16}})
    add_declaration(kDomain, std::make_unique<Declaration>(declare(op, type)));
}

void add_declaration(const char* domain, std::shared_ptr<const CustomOp> op) {
  declarations().push_back({domain, std::move(op)});
}

int64_t anybit_kernels_made() { return kernels_made; }

OrtStatus* register_ops(OrtSessionOptions* options, const OrtApiBase* base) {
  table = base->GetApi(kApiVersion);
  if (table == nullptr) {
    table = base->GetApi(kOldestApi);
    return status_of(std::string("ONNX Runtime: got version ") + base->GetVersionString() +
                     ", expected 1.17 or later. Update onnxruntime.");
  }
  if (!cpu::chosen_isa().error.empty()) return status_of(cpu::chosen_isa().error);
  return guarded([&] {
    for (OrtCustomOpDomain* domain : domains()) ask(Function::kAddCustomOpDomain, options, domain);
  });
}

}  // namespace anybit::ort
