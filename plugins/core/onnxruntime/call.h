// The tensors of one run of a node whose shapes are the sequences', so that they are checked each time.
#pragma once
#include "core/onnxruntime/context.h"

namespace anybit::ort {

using Dims = std::vector<int64_t>;

struct Call {
  const char* op;
  const char* const* input_names;
  OrtKernelContext* context;

  std::string where(size_t i) const { return std::string(op) + " input " + input_names[i]; }

  [[noreturn]] void refuse(size_t i, const Tensor& got, const std::string& expected) const {
    fail(where(i),
         std::string("got ") + name_of(got.type) + " " + got.text() + ", expected " + expected,
         "Feed tensors that fit each other");
  }

  int32_t size(int64_t dim) const {
    if (dim > std::numeric_limits<int32_t>::max() / 2)
      fail(op, "got a dimension of " + std::to_string(dim) + ", expected fewer than 2^30",
           "Lower the batch or the sequence length");
    return static_cast<int32_t>(dim);
  }

  size_t inputs() const {
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
    const OrtValue* found = value(i);
    if (found == nullptr) fail(where(i), "got nothing, expected a tensor", kExportAgain);
    const Tensor tensor = describe(found, [&] { return where(i); });
    if (tensor.type != type) refuse(i, tensor, name_of(type));
    return tensor;
  }

  const void* input(size_t i, int type, const Dims& dims) const {
    const Tensor tensor = read(i, type);
    bool same = tensor.rank == dims.size();
    for (size_t d = 0; same && d < dims.size(); ++d) same = tensor.dims[d] == dims[d];
    if (!same) refuse(i, tensor, name_of(type) + (" " + text_of(dims)));
    return data_of(value(i));
  }

  void* output(size_t i, const Dims& dims) const {
    OrtValue* made = nullptr;
    ask(Function::kKernelContextGetOutput, context, i, dims.data(), dims.size(), &made);
    return data_of(made);
  }
};

}  // namespace anybit::ort
