// The inputs of a node, and the tensors of one of its runs: most shapes are the sequences', so that they
// are checked each time.
#pragma once
#include <optional>
#include <vector>

#include "core/onnxruntime/context.h"

namespace anybit::ort {

// Constant inputs are described once: asking ONNX Runtime in a run is slow, since the weights have pushed
// what it knows out of the processor's caches. It keeps constants where they are as long as the node.
class Inputs {
 public:
  Inputs(const OrtKernelInfo* info, const char* op, const char* const* names, size_t count)
      : op_(op), names_(names), constants_(count) {
    for (size_t i = 0; i < count; ++i) {
      if (const OrtValue* value = constant_input(info, i))
        constants_[i] = describe(value, [&] { return where(i); });
    }
  }

  const char* op() const { return op_; }
  std::string where(size_t i) const { return std::string(op_) + " input " + names_[i]; }
  // Null where the input is not the same in every run.
  const Tensor* constant(size_t i) const { return constants_[i] ? &*constants_[i] : nullptr; }

 private:
  const char* op_;
  const char* const* names_;
  std::vector<std::optional<Tensor>> constants_;
};

struct Call {
  const Inputs& node;
  OrtKernelContext* context;

  std::string where(size_t i) const { return node.where(i); }

  [[noreturn]] void refuse(size_t i, const Tensor& got, const std::string& expected) const {
    fail(where(i),
         std::string("got ") + name_of(got.type) + " " + got.text() + ", expected " + expected,
         "Feed tensors that fit each other");
  }

  int32_t size(int64_t dim) const {
    if (dim > std::numeric_limits<int32_t>::max() / 2)
      fail(node.op(), "got a dimension of " + std::to_string(dim) + ", expected fewer than 2^30",
           "Lower the batch or the sequence length");
    return static_cast<int32_t>(dim);
  }

  size_t input_count() const {
    size_t count = 0;
    const OrtKernelContext* given = context;
    ask(Function::kKernelContextGetInputCount, given, &count);
    return count;
  }

  const OrtValue* value(size_t i) const {
    const OrtKernelContext* inputs = context;
    const OrtValue* found = nullptr;
    ask(Function::kKernelContextGetInput, inputs, i, &found);
    return found;
  }

  Tensor read(size_t i, int type) const {
    Tensor tensor;
    if (const Tensor* constant = node.constant(i)) {
      tensor = *constant;
    } else {
      const OrtValue* found = value(i);
      if (found == nullptr) fail(where(i), "got nothing, expected a tensor", kExportAgain);
      tensor = describe(found, [&] { return where(i); });
    }
    if (tensor.type != type) refuse(i, tensor, name_of(type));
    return tensor;
  }

  // The data of an input that has been read, where it has that shape.
  const void* data(size_t i, const Tensor& tensor, const Dims& dims) const {
    if (!(tensor == dims)) refuse(i, tensor, name_of(tensor.type) + (" " + dims.text()));
    return tensor.data;
  }

  const void* input(size_t i, int type, const Dims& dims) const {
    return data(i, read(i, type), dims);
  }

  void* output(size_t i, const Dims& dims) const {
    OrtValue* made = nullptr;
    ask(Function::kKernelContextGetOutput, context, i, dims.dims.data(), dims.rank, &made);
    return data_of(made);
  }
};

}  // namespace anybit::ort
