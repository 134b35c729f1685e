// Plays TensorRT for the example: an engine of one layer whose next token is always one more than the
// last. Its file holds two numbers: the positions that its tables have, and the tokens that its
// profiles allow. It fails where a position is beyond the tables, which a GPU would read past.
#pragma once
#include <cstdint>
#include <cstdio>
#include <map>
#include <string>

#define TRT_MAJOR_RTX 1

namespace nvinfer1 {

enum class DataType { kFLOAT, kHALF };
enum class OptProfileSelector { kMIN, kOPT, kMAX };
struct Dims {
  int32_t nbDims;
  int64_t d[8];
};
struct Dims2 : Dims {
  Dims2(int64_t first, int64_t second) : Dims{2, {first, second}} {}
};
class ILogger {
 public:
  enum class Severity { kERROR, kWARNING, kINFO };
  virtual void log(Severity severity, const char* text) noexcept = 0;
};

constexpr int64_t kVocabulary = 1000;

class IExecutionContext {
 public:
  explicit IExecutionContext(int64_t positions) : positions_(positions) {}
  bool setOptimizationProfileAsync(int32_t, int*) { return true; }
  bool setInputShape(const char* name, const Dims& dims) {
    shapes_[name] = dims;
    return true;
  }
  bool setTensorAddress(const char* name, void* data) {
    data_[name] = data;
    return true;
  }
  bool enqueueV3(int*) {
    const int64_t count = shapes_["input_ids"].d[1];
    const auto* ids = static_cast<const int64_t*>(data_["input_ids"]);
    const auto* places = static_cast<const int64_t*>(data_["position_ids"]);
    const int64_t past = shapes_["past_key_values.0.key"].d[2];
    if (places[count - 1] >= positions_ || shapes_["attention_mask"].d[1] != past + count)
      return false;
    const int64_t wanted = *static_cast<const int64_t*>(data_["logits_indices"]);
    if (shapes_["logits_indices"].d[1] != 1 || wanted != count - 1) return false;
    for (int64_t i = 0; i < kVocabulary; ++i)
      static_cast<float*>(data_["logits"])[i] = i == ids[wanted] + 1;
    return true;
  }

 private:
  int64_t positions_;
  std::map<std::string, Dims> shapes_;
  std::map<std::string, void*> data_;
};

class ICudaEngine {
 public:
  explicit ICudaEngine(const std::string& file) {
    std::sscanf(file.c_str(), "%lld %lld", &positions_, &allowed_);
  }
  IExecutionContext* createExecutionContext() { return new IExecutionContext(positions_); }
  int32_t getNbIOTensors() const { return 7; }
  const char* getIOTensorName(int32_t index) const {
    static const char* const kNames[] = {
        "input_ids", "attention_mask",          "position_ids", "past_key_values.0.key",
        "logits",    "past_key_values.0.value", "present.0.key"};
    return kNames[index];
  }
  Dims getProfileShape(const char* name, int32_t profile, OptProfileSelector) const {
    if (std::string(name) == "input_ids") return Dims2(1, profile == 0 ? allowed_ : 1);
    return Dims{4, {1, 2, allowed_ - 1, 4}};
  }
  Dims getTensorShape(const char*) const { return Dims{3, {1, -1, kVocabulary}}; }
  DataType getTensorDataType(const char*) const { return DataType::kHALF; }

 private:
  long long positions_ = 0, allowed_ = 0;
};

class IRuntime {
 public:
  ICudaEngine* deserializeCudaEngine(const void* data, size_t size) {
    return new ICudaEngine(std::string(static_cast<const char*>(data), size));
  }
};
inline IRuntime* createInferRuntime(ILogger&) { return new IRuntime; }

class IPluginRegistry {
 public:
  void* loadLibrary(const char*) { return this; }
};

}  // namespace nvinfer1

inline nvinfer1::IPluginRegistry* getPluginRegistry() {
  static nvinfer1::IPluginRegistry registry;
  return &registry;
}
