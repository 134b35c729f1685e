// ONNX Runtime through its C API, opened at run time: sessions and tensors that free themselves.
#pragma once
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "core/onnxruntime/api.h"
#include "library.hpp"

namespace anybit::ort {

// The library and its table of functions.
class Api {
 public:
  // Throws Error: it cannot be opened, or is older than kOldest.
  explicit Api(const std::filesystem::path& library);

  const std::string& version() const { return version_; }

  // A function that returns no status.
  template <class Result = void, class... Arguments>
  Result plain(Function function, Arguments... arguments) const {
    return call_in<Result>(table_, function, arguments...);
  }

  // A function that returns a status. Throws Error: it failed; `where` stands in the message.
  template <class... Arguments>
  void operator()(const std::string& where, Function function, Arguments... arguments) const {
    if (OrtStatus* status = call_in<OrtStatus*>(table_, function, arguments...)) {
      fail(where, status);
    }
  }

 private:
  [[noreturn]] void fail(const std::string& where, OrtStatus* status) const;

  Library library_;
  const void* const* table_ = nullptr;
  std::string version_;
};

struct Release {
  const Api* api = nullptr;
  Function function{};
  template <class T>
  void operator()(T* object) const {
    api->plain(function, object);
  }
};

template <class T>
using Owned = std::unique_ptr<T, Release>;
using Value = Owned<OrtValue>;

class Session {
 public:
  struct Options {
    int threads = 1;
    std::filesystem::path kernels;  // empty: the bodies of the custom nodes run
  };

  // Throws Error: ONNX Runtime refuses the kernels or the graph.
  Session(const std::filesystem::path& library, const std::filesystem::path& graph,
          const Options& options);

  const Api& api() const { return api_; }

  // A tensor of ONNX Runtime's own memory, or of the caller's, which must outlive it.
  Value tensor(ElementType type, const std::vector<int64_t>& dims) const;
  Value tensor(ElementType type, const std::vector<int64_t>& dims, void* data, size_t bytes) const;
  void* data(const OrtValue* value) const;
  std::vector<int64_t> dims(const OrtValue* value) const;

  // One call. An output that is null is allocated, another is written in place.
  // Throws Error: it failed; outputs that were null may be there or not.
  void run(const std::vector<const char*>& input_names, const std::vector<const OrtValue*>& inputs,
           const std::vector<const char*>& output_names, std::vector<Value>& outputs) const;

 private:
  Api api_;
  Owned<OrtEnv> env_;
  Owned<OrtMemoryInfo> memory_;
  Owned<OrtSession> session_;
  OrtAllocator* allocator_ = nullptr;  // ONNX Runtime's own
};

}  // namespace anybit::ort
