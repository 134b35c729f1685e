// What the custom ops share when ONNX Runtime calls them: errors in three parts, tensors, threads. No
// exception leaves a function that ONNX Runtime calls.
#pragma once
#include <exception>
#include <limits>
#include <memory>
#include <new>
#include <string>

#include "core/cpu/machine.h"
#include "core/cpu/parallel.h"
#include "core/host/params.h"
#include "core/onnxruntime/api.h"
#include "core/onnxruntime/dims.h"

namespace anybit::ort {

// Kernels that the calling thread has made; each counts itself.
inline thread_local int64_t kernels_made = 0;

constexpr const char* kExportAgain = "Export the model again";

// What ends a call: the three parts of an error, or a status of ONNX Runtime's own.
struct Failure {
  std::string text;
  OrtStatus* status = nullptr;
};

[[noreturn]] inline void fail(const std::string& where, const std::string& problem,
                              const std::string& fix) {
  throw Failure{where + ": " + problem + ". " + fix + "."};
}

inline OrtStatus* status_of(const std::string& text) {
  return call<OrtStatus*>(Function::kCreateStatus, static_cast<int>(kInvalidArgument),
                          text.c_str());
}

// Runs body() and turns what it throws into a status.
template <class F>
OrtStatus* guarded(const F& body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const Failure& failure) {
    return failure.status ? failure.status : status_of(failure.text);
  } catch (const std::bad_alloc&) {
    return status_of("Memory: got less than a node needs. Close other programs.");
  } catch (const std::exception& error) {
    return status_of(error.what());
  }
}

// Calls a function that returns a status.
template <class... Arguments>
void ask(Function function, Arguments... arguments) {
  OrtStatus* status = call<OrtStatus*>(function, arguments...);
  if (status != nullptr) throw Failure{"", status};
}

struct Tensor : Dims {
  int type = kUndefined;
  void* data = nullptr;
};

inline void* data_of(const OrtValue* value) {
  void* data = nullptr;
  ask(Function::kGetTensorMutableData, const_cast<OrtValue*>(value), &data);
  return data;
}

// where() is called where there is an error to report.
template <class F>
Tensor describe(const OrtValue* value, const F& where) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  ask(Function::kGetTensorTypeAndShape, value, &info);
  const auto release = [](OrtTensorTypeAndShapeInfo* p) {
    call<void>(Function::kReleaseTensorTypeAndShapeInfo, p);
  };
  const std::unique_ptr<OrtTensorTypeAndShapeInfo, decltype(release)> owner(info, release);
  const OrtTensorTypeAndShapeInfo* known = info;
  Tensor tensor;
  ask(Function::kGetTensorElementType, known, &tensor.type);
  ask(Function::kGetDimensionsCount, known, &tensor.rank);
  if (tensor.rank > kMostDims)
    fail(where(), "got a tensor of rank " + std::to_string(tensor.rank) + ", expected at most 8",
         "Reshape it");
  ask(Function::kGetDimensions, known, tensor.dims.data(), tensor.rank);
  tensor.data = data_of(value);
  return tensor;
}

// An input of a node that is the same in every run; null where it is not.
inline const OrtValue* constant_input(const OrtKernelInfo* info, size_t i) {
  int constant = 0;
  const OrtValue* value = nullptr;
  ask(Function::kKernelInfoGetConstantInputTensor, info, i, &constant, &value);
  return constant != 0 ? value : nullptr;
}

inline const char* name_of(int type) {
  switch (type) {
    case kFloat: return "fp32";
    case kHalf: return "fp16";
    case kBFloat16: return "bf16";
    case kInt32: return "int32";
    case kInt64: return "int64";
    case kBool: return "bool";
    case kInt8: return "int8";
    default: return "another type";
  }
}

// The DType of a tensor of the model's type.
inline int32_t dtype_of(int type) {
  return type == kHalf ? kFloat16 : type == kBFloat16 ? ::kBFloat16 : kFloat32;
}

// ONNX Runtime's threads, for the kernels of one call.
class Threads {
 public:
  explicit Threads(const OrtKernelContext* context) : context_(context) {}

  cpu::Parallel parallel() const {
    static const int cores =
        cpu::usable_cores();  // as it was at first: a kernel asks at every call
    return {[](void* pool, cpu::Parallel::Task task, void* data, size_t count) {
              const Threads& threads = *static_cast<const Threads*>(pool);
              if (threads.status_ != nullptr) return;  // the call has failed already
              threads.status_ = call<OrtStatus*>(Function::kKernelContextParallelFor,
                                                 threads.context_, task, count, count, data);
            },
            const_cast<Threads*>(this), cores};
  }

  // Ends the call where ONNX Runtime could not share it.
  void check() const {
    if (status_ != nullptr) throw Failure{"", status_};
  }

 private:
  const OrtKernelContext* context_;
  mutable OrtStatus* status_ = nullptr;
};

// What all ops here answer alike: no variadic inputs, every output there, any version of the op, and a
// Kernel(const Op&, const OrtKernelInfo*) with compute(OrtKernelContext*) for each node.
template <class Kernel, class Op>
void declare_kernel(Op& op) {
  op.version = kApiVersion;
  op.GetExecutionProviderType = [](const CustomOp*) -> const char* { return nullptr; };
  op.GetOutputCharacteristic = [](const CustomOp*, size_t) -> int { return kRequired; };
  op.GetInputMemoryType = [](const CustomOp*, size_t) { return 0; };
  op.GetVariadicInputMinArity = op.GetVariadicOutputMinArity = [](const CustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity =
      op.GetVariadicOutputHomogeneity = [](const CustomOp*) { return 0; };
  op.CreateKernelV2 = [](const CustomOp* self, const void* const*, const OrtKernelInfo* info,
                         void** kernel) {
    return guarded([&] { *kernel = new Kernel(*static_cast<const Op*>(self), info); });
  };
  op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    return guarded([&] { static_cast<const Kernel*>(kernel)->compute(context); });
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.GetStartVersion = [](const CustomOp*) { return 1; };
  op.GetEndVersion = [](const CustomOp*) { return std::numeric_limits<int>::max(); };
}

}  // namespace anybit::ort
