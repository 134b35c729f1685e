// The tensors of one run of a node whose shapes are the sequences', so that they are checked each time.
#pragma once
#include <array>

#include "core/onnxruntime/context.h"

namespace anybit::ort {

// The constant inputs of a node among its first kMost, described once: all that is asked of ONNX Runtime
// in a run finds the processor's caches empty, behind weights that went through them.
class Constants {
 public:
  static constexpr size_t kMost = 8;

  Constants() = default;
  explicit Constants(const OrtKernelInfo* info) {
    for (size_t i = 0; i < kMost; ++i) {
      const OrtValue* value = constant_input(info, i);
      if (value == nullptr) continue;
      known_[i] = describe(value, [i] { return "Input " + std::to_string(i); });
      is_known_[i] = true;
    }
  }

  const Tensor* find(size_t i) const { return i < kMost && is_known_[i] ? &known_[i] : nullptr; }

 private:
  std::array<Tensor, kMost> known_{};
  std::array<bool, kMost> is_known_{};
};

struct Call {
  const char* op;
  const char* const* input_names;
  OrtKernelContext* context;
  const Constants& constants;

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
    Tensor tensor;
    if (const Tensor* known = constants.find(i)) {
      tensor = *known;
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
