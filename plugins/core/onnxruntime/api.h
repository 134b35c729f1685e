// The part of ONNX Runtime's C API that a custom-op library needs, and what runs a model
// (deploy/runtime), so that none of its headers is.
//
// The API is a table of function pointers that only ever grows at its end; the numbers below are
// places in it, those of OrtApi in onnxruntime_c_api.h (github.com/microsoft/onnxruntime) from
// version 1.17 on.
#pragma once
#include <cstddef>
#include <cstdint>

struct OrtStatus;  // null is success
struct OrtValue;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtCustomOpDomain;
struct OrtSessionOptions;
struct OrtTensorTypeAndShapeInfo;
struct OrtAllocator;
struct OrtEnv;
struct OrtMemoryInfo;
struct OrtRunOptions;
struct OrtSession;
struct OrtTypeInfo;

struct OrtApiBase {
  const void* const* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

namespace anybit::ort {

constexpr uint32_t kApiVersion = 17;  // the first that has every function below
constexpr uint32_t kOldestApi = 1;    // which every later one extends

enum class Function : int {
  kCreateStatus = 0,
  kGetErrorMessage = 2,
  kCreateEnv = 3,
  kDisableTelemetryEvents = 6,
  kCreateSession = 7,
  kRun = 9,
  kCreateSessionOptions = 10,
  kSetSessionLogSeverityLevel = 22,
  kSetIntraOpNumThreads = 24,
  kCreateCustomOpDomain = 26,
  kCustomOpDomainAdd = 27,
  kAddCustomOpDomain = 28,
  kRegisterCustomOpsLibrary = 29,
  kCreateTensorAsOrtValue = 48,
  kCreateTensorWithDataAsOrtValue = 49,
  kGetTensorMutableData = 51,
  kGetTensorElementType = 60,
  kGetDimensionsCount = 61,
  kGetDimensions = 62,
  kGetTensorTypeAndShape = 65,
  kCreateCpuMemoryInfo = 69,
  kGetAllocatorWithDefaultOptions = 78,
  kKernelInfoGetAttributeFloat = 85,
  kKernelInfoGetAttributeInt64 = 86,
  kKernelInfoGetAttributeString = 87,
  kKernelContextGetInputCount = 88,
  kKernelContextGetInput = 90,
  kKernelContextGetOutput = 91,
  kReleaseEnv = 92,
  kReleaseStatus = 93,
  kReleaseMemoryInfo = 94,
  kReleaseSession = 95,
  kReleaseValue = 96,
  kReleaseTensorTypeAndShapeInfo = 99,
  kReleaseSessionOptions = 100,
  kKernelInfoGetConstantInputTensor = 249,
  kKernelContextParallelFor = 274,
};

enum ErrorCode : int { kFail = 1, kInvalidArgument = 2 };

// ONNXTensorElementDataType; undefined stands for any type in an op's declaration.
enum ElementType : int {
  kUndefined = 0,
  kFloat = 1,
  kUint8 = 2,
  kInt8 = 3,
  kInt32 = 6,
  kInt64 = 7,
  kBool = 9,
  kHalf = 10,
  kBFloat16 = 16,
};

enum Characteristic : int { kRequired = 0, kOptional = 1 };

// OrtCustomOp of version 17: what ONNX Runtime asks of an op. The older forms of the functions that
// return a status stay null.
struct CustomOp {
  uint32_t version;
  void* (*CreateKernel)(const CustomOp*, const void* const* api, const OrtKernelInfo*);
  const char* (*GetName)(const CustomOp*);
  const char* (*GetExecutionProviderType)(const CustomOp*);
  int (*GetInputType)(const CustomOp*, size_t index);
  size_t (*GetInputTypeCount)(const CustomOp*);
  int (*GetOutputType)(const CustomOp*, size_t index);
  size_t (*GetOutputTypeCount)(const CustomOp*);
  void (*KernelCompute)(void* kernel, OrtKernelContext*);
  void (*KernelDestroy)(void* kernel);
  int (*GetInputCharacteristic)(const CustomOp*, size_t index);
  int (*GetOutputCharacteristic)(const CustomOp*, size_t index);
  int (*GetInputMemoryType)(const CustomOp*, size_t index);
  int (*GetVariadicInputMinArity)(const CustomOp*);
  int (*GetVariadicInputHomogeneity)(const CustomOp*);
  int (*GetVariadicOutputMinArity)(const CustomOp*);
  int (*GetVariadicOutputHomogeneity)(const CustomOp*);
  OrtStatus* (*CreateKernelV2)(const CustomOp*, const void* const* api, const OrtKernelInfo*,
                               void** kernel);
  OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext*);
  OrtStatus* (*InferOutputShapeFn)(const CustomOp*, void* context);
  int (*GetStartVersion)(const CustomOp*);
  int (*GetEndVersion)(const CustomOp*);
  size_t (*GetMayInplace)(int** inputs, int** outputs);
  void (*ReleaseMayInplace)(int* inputs, int* outputs);
  size_t (*GetAliasMap)(int** inputs, int** outputs);
  void (*ReleaseAliasMap)(int* inputs, int* outputs);
};

// The arguments must have the exact types of the function's.
template <class Result, class... Arguments>
Result call_in(const void* const* api, Function function, Arguments... arguments) {
  const void* entry = api[static_cast<int>(function)];
  return reinterpret_cast<Result (*)(Arguments...)>(const_cast<void*>(entry))(arguments...);
}

// A custom-op library's table, set when it is registered.
inline const void* const* table = nullptr;

template <class Result, class... Arguments>
Result call(Function function, Arguments... arguments) {
  return call_in<Result>(table, function, arguments...);
}

}  // namespace anybit::ort
