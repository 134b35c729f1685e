// Runs an engine made by python -m exporter from C++: prefill, then greedy decode, on
// token ids given as arguments.
//
//   embed OUT NEW_TOKENS TOKEN_ID [TOKEN_ID ...]        prints the new token ids
//
// The KV cache is an ordinary input and output of the engine (docs/onnx.md): two sets of buffers
// take turns, because a step reads the past and writes past + new.
#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <regex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#ifdef TRT_MAJOR_RTX
constexpr const char* kEdition = "tensorrt-rtx";
#else
constexpr const char* kEdition = "tensorrt";
#endif
constexpr int32_t kPrefill = 0, kDecode = 1;  // optimisation profiles, in the order of engine.json
constexpr int32_t kCacheAxis = 2;             // of [batch, kv_heads, cached tokens, head_dim]

class Logger final : public nvinfer1::ILogger {
  void log(Severity severity, const char* text) noexcept override {
    if (severity <= Severity::kWARNING) std::cerr << text << '\n';
  }
};

[[noreturn]] void fail(const std::string& where, const std::string& problem,
                       const std::string& fix) {
  throw std::runtime_error(where + ": " + problem + ". " + fix + ".");
}

void check(cudaError_t status, const char* call) {
  if (status != cudaSuccess)
    fail(call, cudaGetErrorString(status), "Check the GPU, its driver and its free memory");
}

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file)
    fail(path, "got no such file, expected an artefact folder", "Make one with python -m exporter");
  return {std::istreambuf_iterator<char>(file), {}};
}

// The string value of a top-level key of engine.json, which is written by python -m
// exporter in a fixed form.
std::string json_string(const std::string& json, const std::string& key) {
  std::smatch match;
  const std::regex pattern("\n  \"" + key + "\": \"([^\"]*)\"");
  return std::regex_search(json, match, pattern) ? match[1].str() : "";
}

// The whole number of a top-level key.
int64_t json_number(const std::string& json, const std::string& key, const std::string& where) {
  std::smatch match;
  const std::regex pattern("\n  \"" + key + "\": ([0-9]+)");
  if (!std::regex_search(json, match, pattern))
    fail(where, "got no " + key + ", expected an engine built by this version",
         "Build the engine again");
  return std::stoll(match[1].str());
}

class DeviceBuffer {
 public:
  explicit DeviceBuffer(size_t bytes) {
    check(cudaMalloc(&data_, std::max<size_t>(bytes, 1)), "cudaMalloc");
  }
  DeviceBuffer(DeviceBuffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    return *this;
  }
  ~DeviceBuffer() { cudaFree(data_); }
  void* get() const { return data_; }

 private:
  void* data_ = nullptr;
};

class Decoder {
 public:
  explicit Decoder(const std::string& folder) {
    const std::string record = read_file(folder + "/engine.json");
    if (json_string(record, "edition") != kEdition) {
      fail(folder, "got an engine of " + json_string(record, "edition") + ", expected " + kEdition,
           "Link against that edition");
    }
    // The plugins must be there before the engine is read, and stay until it is gone.
    const std::string library = folder + "/libanybit_plugins.so";
    if (getPluginRegistry()->loadLibrary(library.c_str()) == nullptr) {
      fail(library, "got no plugins from it, expected ABQGemm and QQQGemm",
           "Build it with: python -m plugins build");
    }
    runtime_.reset(nvinfer1::createInferRuntime(logger_));
    if (!runtime_) fail("TensorRT", "got no runtime, expected one", "Check the GPU and its driver");
    const std::string bytes = read_file(folder + "/model.engine");
    engine_.reset(runtime_->deserializeCudaEngine(bytes.data(), bytes.size()));
    if (!engine_) {
      fail(folder,
           "got an engine of version " + json_string(record, "version") +
               " that this TensorRT refuses, expected its own",
           "Build the engine again with this version");
    }
    check(cudaStreamCreate(&stream_), "cudaStreamCreate");
    for (const int32_t profile : {kPrefill, kDecode}) {
      contexts_.emplace_back(engine_->createExecutionContext());
      if (!contexts_.back() || !contexts_.back()->setOptimizationProfileAsync(profile, stream_)) {
        fail(folder, "got no execution context for profile " + std::to_string(profile),
             "Check the GPU's free memory");
      }
    }
    list_cache();
    allocate(json_number(record, "max_context", folder + "/engine.json"));
  }

  ~Decoder() {
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
  }

  int64_t max_prompt() const { return max_prompt_; }
  int64_t max_context() const { return max_context_; }
  bool full() const { return past_ >= max_context_; }

  // Appends tokens [1, S] to the sequence and returns the most likely next one.
  int64_t step(const std::vector<int64_t>& tokens) {
    const auto count = static_cast<int64_t>(tokens.size()), total = past_ + count;
    auto& context = *contexts_[count == 1 && past_ > 0 ? kDecode : kPrefill];
    std::vector<int64_t> mask(total, 1), positions(count), last{count - 1};
    for (int64_t i = 0; i < count; ++i) positions[i] = past_ + i;
    feed(context, "input_ids", tokens, ids_);
    feed(context, "attention_mask", mask, mask_);
    feed(context, "position_ids", positions, positions_);
    feed(context, "logits_indices", last, last_);
    for (size_t i = 0; i < cache_.size(); ++i) {
      bool ok = context.setInputShape(("past_key_values." + cache_[i]).c_str(), cache_shape(past_));
      ok = ok && context.setTensorAddress(("past_key_values." + cache_[i]).c_str(),
                                          past_buffers_[i].get());
      ok = ok &&
           context.setTensorAddress(("present." + cache_[i]).c_str(), present_buffers_[i].get());
      if (!ok)
        fail("past_key_values." + cache_[i],
             "got a refusal of " + std::to_string(past_) + " cached tokens",
             "Export with a larger --max-seq");
    }
    if (!context.setTensorAddress("logits", logits_.get()) || !context.enqueueV3(stream_)) {
      fail("enqueueV3", "got a failure, expected a queued step", "See the messages above");
    }
    // [1, 1, V]
    check(cudaMemcpyAsync(row_.data(), logits_.get(), vocab_ * sizeof(float),
                          cudaMemcpyDeviceToHost, stream_),
          "cudaMemcpyAsync");
    check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
    std::swap(past_buffers_, present_buffers_);
    past_ = total;
    return std::max_element(row_.begin(), row_.end()) - row_.begin();
  }

 private:
  void list_cache() {
    const std::string prefix = "past_key_values.";
    for (int32_t i = 0; i < engine_->getNbIOTensors(); ++i) {
      const std::string name = engine_->getIOTensorName(i);
      if (name.rfind(prefix, 0) == 0) cache_.push_back(name.substr(prefix.size()));
    }
    if (cache_.empty())
      fail("model.engine", "got no past_key_values inputs, expected those of docs/onnx.md",
           "Export the model again");
  }

  // Position tables end at `longest` tokens, also where the profiles would allow more.
  void allocate(int64_t longest) {
    const std::string first = "past_key_values." + cache_.front();
    const auto max_shape = [&](const std::string& name, int32_t profile) {
      return engine_->getProfileShape(name.c_str(), profile, nvinfer1::OptProfileSelector::kMAX);
    };
    cache_dims_ = max_shape(first, kDecode);
    max_context_ = std::min<int64_t>(longest, cache_dims_.d[kCacheAxis] + 1);
    max_prompt_ = std::min<int64_t>(max_context_, max_shape("input_ids", kPrefill).d[1]);
    vocab_ = engine_->getTensorShape("logits").d[2];
    row_.resize(vocab_);
    // else fp16 or bf16
    const size_t element =
        engine_->getTensorDataType(first.c_str()) == nvinfer1::DataType::kFLOAT ? 4 : 2;
    const size_t cache_bytes = element * cache_dims_.d[1] * max_context_ * cache_dims_.d[3];
    for (size_t i = 0; i < cache_.size(); ++i) {
      past_buffers_.emplace_back(cache_bytes);
      present_buffers_.emplace_back(cache_bytes);
    }
    for (DeviceBuffer* buffer : {&ids_, &mask_, &positions_})
      *buffer = DeviceBuffer(max_context_ * sizeof(int64_t));
    last_ = DeviceBuffer(sizeof(int64_t));
    logits_ = DeviceBuffer(vocab_ * sizeof(float));
  }

  nvinfer1::Dims cache_shape(int64_t tokens) const {
    nvinfer1::Dims dims = cache_dims_;
    dims.d[0] = 1;
    dims.d[kCacheAxis] = tokens;
    return dims;
  }

  void feed(nvinfer1::IExecutionContext& context, const char* name,
            const std::vector<int64_t>& values, const DeviceBuffer& buffer) {
    const auto count = static_cast<int64_t>(values.size());
    check(cudaMemcpyAsync(buffer.get(), values.data(), count * sizeof(int64_t),
                          cudaMemcpyHostToDevice, stream_),
          "cudaMemcpyAsync");
    if (!context.setInputShape(name, nvinfer1::Dims2{1, count}) ||
        !context.setTensorAddress(name, buffer.get())) {
      fail(name,
           "got a refusal of " + std::to_string(count) +
               " tokens, expected one of the engine's profiles",
           "Give fewer tokens");
    }
  }

  // Order matters: what is declared first is destroyed last.
  Logger logger_;
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
  std::vector<std::unique_ptr<nvinfer1::IExecutionContext>> contexts_;
  cudaStream_t stream_ = nullptr;
  std::vector<std::string> cache_;  // "0.key", "0.value", ...
  std::vector<DeviceBuffer> past_buffers_, present_buffers_;
  DeviceBuffer ids_{1}, mask_{1}, positions_{1}, last_{1}, logits_{1};
  std::vector<float> row_;
  nvinfer1::Dims cache_dims_{};
  int64_t max_prompt_ = 0, max_context_ = 0, vocab_ = 0, past_ = 0;
};

int main(int argc, char** argv) {
  if (argc < 4) {
    std::cerr << "usage: embed OUT NEW_TOKENS TOKEN_ID [TOKEN_ID ...]\n";
    return 2;
  }
  try {
    const int new_tokens = std::stoi(argv[2]);
    std::vector<int64_t> tokens;
    for (int i = 3; i < argc; ++i) tokens.push_back(std::stoll(argv[i]));
    Decoder decoder(std::string(argv[1]) + "/engine");
    if (static_cast<int64_t>(tokens.size()) > decoder.max_prompt()) {
      fail("TOKEN_ID",
           "got " + std::to_string(tokens.size()) + " tokens, expected at most " +
               std::to_string(decoder.max_prompt()),
           "Give fewer, or export with a larger --max-seq");
    }
    int made = 0;
    for (; made < new_tokens && !decoder.full(); ++made) {
      tokens = {decoder.step(tokens)};
      std::cout << tokens[0] << ' ' << std::flush;
    }
    std::cout << '\n';
    if (made < new_tokens)
      std::cerr << "The context of " << decoder.max_context() << " tokens is full.\n";
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 2;
  }
  return 0;
}
