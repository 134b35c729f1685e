// Calls ONNX Runtime's C API.
#include "onnxruntime/session.hpp"

#include <cstdio>

#include "anybit/error.hpp"

namespace anybit::ort {
namespace {

constexpr int kOldest = 23;         // 1.23: opset 23
constexpr int kErrorsOnly = 3;      // OrtLoggingLevel
constexpr int kArenaAllocator = 1;  // OrtAllocatorType
constexpr int kDefaultMemory = 0;   // OrtMemType
constexpr size_t kLongest = 300;    // bytes of a reason that stands in a message
const char* const kInstall =
    "Install it (pip install onnxruntime, or your system's package) and name libonnxruntime.so in "
    "the options or in ANYBIT_ONNXRUNTIME";

std::string one_line(const std::string& text) {
  std::string line;
  for (const char c : text) {
    if (!isspace(static_cast<unsigned char>(c))) {
      line += c;
    } else if (!line.empty() && line.back() != ' ') {
      line += ' ';
    }
  }
  return line;
}

}  // namespace

Api::Api(const std::filesystem::path& library) : library_(library, "ONNX Runtime", kInstall) {
  const auto base = reinterpret_cast<const OrtApiBase* (*)()>(library_.symbol("OrtGetApiBase"))();
  version_ = base->GetVersionString();
  int major = 0, minor = 0;
  sscanf(version_.c_str(), "%d.%d", &major, &minor);
  table_ = base->GetApi(kApiVersion);
  if (!table_ || major != 1 || minor < kOldest) {
    throw Error(library_.path().string(),
                "got ONNX Runtime " + version_ + ", expected 1." + std::to_string(kOldest) +
                    " or a later 1.x",
                "Install a later one, and name it in the options or in ANYBIT_ONNXRUNTIME");
  }
}

void Api::fail(const std::string& where, OrtStatus* status) const {
  const std::string reason = one_line(
      plain<const char*>(Function::kGetErrorMessage, static_cast<const OrtStatus*>(status)));
  plain(Function::kReleaseStatus, status);
  throw Error(where, "ONNX Runtime says: " + printable(reason, kLongest),
              "If the file was not changed, ask for help with this message");
}

Session::Session(const std::filesystem::path& library, const std::filesystem::path& graph,
                 const Options& options)
    : api_(library) {
  OrtEnv* env = nullptr;
  api_("ONNX Runtime", Function::kCreateEnv, kErrorsOnly, "anybit", &env);
  env_ = {env, {&api_, Function::kReleaseEnv}};
  api_("ONNX Runtime", Function::kDisableTelemetryEvents, static_cast<const OrtEnv*>(env));
  OrtMemoryInfo* memory = nullptr;
  api_("ONNX Runtime", Function::kCreateCpuMemoryInfo, kArenaAllocator, kDefaultMemory, &memory);
  memory_ = {memory, {&api_, Function::kReleaseMemoryInfo}};
  api_("ONNX Runtime", Function::kGetAllocatorWithDefaultOptions, &allocator_);

  OrtSessionOptions* raw = nullptr;
  api_("ONNX Runtime", Function::kCreateSessionOptions, &raw);
  const Owned<OrtSessionOptions> settings(raw, {&api_, Function::kReleaseSessionOptions});
  api_("ONNX Runtime", Function::kSetSessionLogSeverityLevel, raw, kErrorsOnly);
  api_("threads", Function::kSetIntraOpNumThreads, raw, options.threads);
  if (!options.kernels.empty()) {
    void* handle = nullptr;  // stays open
    api_(options.kernels.string(), Function::kRegisterCustomOpsLibrary, raw,
         options.kernels.c_str(), &handle);
  }
  OrtSession* session = nullptr;
  api_(graph.string(), Function::kCreateSession, static_cast<const OrtEnv*>(env), graph.c_str(),
       static_cast<const OrtSessionOptions*>(raw), &session);
  session_ = {session, {&api_, Function::kReleaseSession}};
}

Value Session::tensor(ElementType type, const std::vector<int64_t>& dims) const {
  OrtValue* value = nullptr;
  api_("a tensor", Function::kCreateTensorAsOrtValue, allocator_, dims.data(), dims.size(),
       static_cast<int>(type), &value);
  return {value, {&api_, Function::kReleaseValue}};
}

Value Session::tensor(ElementType type, const std::vector<int64_t>& dims, void* data,
                      size_t bytes) const {
  OrtValue* value = nullptr;
  api_("a tensor", Function::kCreateTensorWithDataAsOrtValue,
       static_cast<const OrtMemoryInfo*>(memory_.get()), data, bytes, dims.data(), dims.size(),
       static_cast<int>(type), &value);
  return {value, {&api_, Function::kReleaseValue}};
}

void* Session::data(const OrtValue* value) const {
  void* data = nullptr;
  api_("a tensor", Function::kGetTensorMutableData, const_cast<OrtValue*>(value), &data);
  return data;
}

std::vector<int64_t> Session::dims(const OrtValue* value) const {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  api_("a tensor", Function::kGetTensorTypeAndShape, value, &info);
  const Owned<OrtTensorTypeAndShapeInfo> owned(info,
                                               {&api_, Function::kReleaseTensorTypeAndShapeInfo});
  const auto* shape = static_cast<const OrtTensorTypeAndShapeInfo*>(info);
  size_t rank = 0;
  api_("a tensor", Function::kGetDimensionsCount, shape, &rank);
  std::vector<int64_t> dims(rank);
  api_("a tensor", Function::kGetDimensions, shape, dims.data(), rank);
  return dims;
}

void Session::run(const std::vector<const char*>& input_names,
                  const std::vector<const OrtValue*>& inputs,
                  const std::vector<const char*>& output_names, std::vector<Value>& outputs) const {
  std::vector<OrtValue*> raw;
  for (const Value& value : outputs) raw.push_back(value.get());
  struct Keep {  // what was allocated, also where the call failed
    const Api& api;
    std::vector<OrtValue*>& raw;
    std::vector<Value>& outputs;
    ~Keep() {
      for (size_t i = 0; i < raw.size(); ++i) {
        if (raw[i] != outputs[i].get()) outputs[i] = {raw[i], {&api, Function::kReleaseValue}};
      }
    }
  } keep{api_, raw, outputs};
  api_("a call of the model", Function::kRun, session_.get(),
       static_cast<const OrtRunOptions*>(nullptr), input_names.data(), inputs.data(), inputs.size(),
       output_names.data(), output_names.size(), raw.data());
}

}  // namespace anybit::ort
