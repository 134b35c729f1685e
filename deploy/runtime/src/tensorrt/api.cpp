// Calls TensorRT's virtual functions by their places in its tables.
#include "tensorrt/api.hpp"

#include <cstdlib>
#include <map>
#include <mutex>

#include "anybit/error.hpp"
#include "json.hpp"
#include "sha256.hpp"

namespace anybit::trt {
namespace {

namespace fs = std::filesystem;
using nvinfer1::DataType;
using nvinfer1::Dims;

constexpr Edition kEditions[] = {
    {"tensorrt", "TensorRT", "libnvinfer.so", "tensorrt_libs", "pip install tensorrt"},
    {"tensorrt-rtx", "TensorRT-RTX", "libtensorrt_rtx.so", "tensorrt_rtx_libs",
     "pip install tensorrt-rtx-cu13"},
};

constexpr const char* kNamespace = "anybit";
constexpr const char* kPluginVersion = "1";
constexpr int32_t kUserManaged = 2;  // ExecutionContextAllocationStrategy
constexpr int32_t kMax = 2;          // OptProfileSelector
constexpr int32_t kInput = 1;        // TensorIOMode
constexpr size_t kLongest = 600;     // bytes of TensorRT's reason that stand in a message

// Itanium C++ ABI: an object begins with the address of its table of functions, each of which gets
// the object first.
template <class Result, class... Arguments>
Result call(void* object, int slot, Arguments... arguments) {
  const void* const* table = *static_cast<const void* const* const*>(object);
  return reinterpret_cast<Result (*)(void*, Arguments...)>(const_cast<void*>(table[slot]))(
      object, arguments...);
}

// ---- what TensorRT says

thread_local std::vector<std::string> said;  // errors, by the thread that it says them on

void take(Severity severity, const char* text) noexcept {
  try {
    if (severity <= Severity::kError && text && said.size() < 20) said.emplace_back(text);
  } catch (const std::exception&) {  // no memory
  }
}

struct Log10 final : Logger10 {
  void log(Severity severity, const char* text) noexcept override { take(severity, text); }
};
struct Log11 final : Logger11 {
  nvinfer1::InterfaceInfo getInterfaceInfo() const noexcept override { return {"ILogger", 1, 0}; }
  void log(Severity severity, const char* text) noexcept override { take(severity, text); }
};

// TensorRT keeps the first one that it is given.
void* logger(LoggerLayout layout) {
  static Log10 log10;
  static Log11 log11;
  return layout == LoggerLayout::kTensorRT10 ? static_cast<void*>(&log10) : &log11;
}

// What it has said on this thread since the last time, in one line.
std::string reasons() {
  std::string line;
  for (const std::string& text : std::exchange(said, {})) line += (line.empty() ? "" : "; ") + text;
  return line.empty() ? "no reason" : "\"" + printable(line, kLongest) + "\"";
}

std::string text_of(const std::vector<int64_t>& dims) {
  std::string text;
  for (const int64_t size : dims) text += (text.empty() ? "[" : ", ") + std::to_string(size);
  return text + "]";
}

std::vector<int64_t> sizes_of(const Dims& dims) {
  return {dims.d, dims.d + std::max(dims.nbDims, 0)};
}

ort::ElementType element_type(DataType type) {
  switch (type) {
    case DataType::kFLOAT: return ort::kFloat;
    case DataType::kHALF: return ort::kHalf;
    case DataType::kBF16: return ort::kBFloat16;
    case DataType::kINT8: return ort::kInt8;
    case DataType::kUINT8: return ort::kUint8;
    case DataType::kINT32: return ort::kInt32;
    case DataType::kINT64: return ort::kInt64;
    case DataType::kBOOL: return ort::kBool;
    default: return ort::kUndefined;
  }
}

}  // namespace

const Edition& find_edition(const std::string& name, const std::string& where,
                            const std::string& fix) {
  for (const Edition& edition : kEditions) {
    if (name == edition.name) return edition;
  }
  throw Error(where, "got " + printable(name) + ", expected tensorrt or tensorrt-rtx", fix);
}

Api::Api(const fs::path& library, const Edition& edition)
    : edition_(edition), library_(library, edition.title, edition.install) {
  const auto number = [&](const char* part) {
    const std::string name = std::string("getInferLib") + part + "Version";
    return reinterpret_cast<int32_t (*)()>(library_.symbol(name.c_str()))();
  };
  const int major = number("Major"), minor = number("Minor");
  for (const int part : {major, minor, number("Patch"), number("Build")}) {
    version_ += (version_.empty() ? "" : ".") + std::to_string(part);
  }
  const bool rtx = std::string(edition.name) == "tensorrt-rtx";
  if (rtx ? major == 1 && minor >= 7 : major == 11) {
    layout_ = &kLayout11;
  } else if (!rtx && major == 10 && minor >= 1) {
    layout_ = &kLayout10;
  } else {
    throw Error(library.string(),
                std::string("got ") + edition.title + " " + version_ + ", expected " +
                    (rtx ? "1.7 or a later 1.x" : "10.1 to 11.x"),
                "Install such a version and build the engine with it");
  }
}

void Api::load_plugins(const fs::path& library, const std::vector<std::string>& ops) const {
  static std::mutex mutex;
  static std::map<void*, std::string> loaded;  // hashes, by registry
  const char* const fix = "Build the engine again: its folder holds the library that it needs";
  const std::lock_guard lock(mutex);
  void* registry = reinterpret_cast<void* (*)()>(library_.symbol("getPluginRegistry"))();
  const std::string hash = sha256_file(library);
  const auto before = loaded.find(registry);
  if (before != loaded.end() && before->second != hash) {
    throw Error(library.string(),
                "got a second plugin library in one process, expected the one that is loaded",
                "Load the models in processes of their own, or build both engines again");
  }
  said.clear();
  if (before == loaded.end()) {
    const std::string path = library.string();
    if (!call<void*>(registry, layout_->registry.load_library, path.c_str())) {
      throw Error(path, "got " + reasons() + " from " + edition_.title + ", expected plugins", fix);
    }
    loaded.emplace(registry, hash);
  }
  for (const std::string& op : ops) {
    if (!call<void*>(registry, layout_->registry.get_creator, op.c_str(), kPluginVersion,
                     kNamespace)) {
      throw Error(library.string(), "got no plugin " + printable(op) + ", expected it", fix);
    }
  }
}

void* Api::create_runtime() const {
  using Create = void* (*)(void*, int32_t);
  const auto create = reinterpret_cast<Create>(library_.symbol("createInferRuntime_INTERNAL"));
  const auto version = reinterpret_cast<int32_t (*)()>(library_.symbol("getInferLibVersion"))();
  void* const made = create(logger(layout_->logger), version);
  // The lean runtimes of TensorRT 10 and 11 return, where CUDA does not start, a small number: null
  // as the address of a member.
  constexpr uintptr_t kFirstPage = 4096;
  return reinterpret_cast<uintptr_t>(made) < kFirstPage ? nullptr : made;
}

Shell::~Shell() {
  constexpr int kDelete = 1;  // the second destructor, which frees the object too
  if (object_) call<void>(object_, kDelete);
}

// ---- contexts

Context::Context(const Api& api, void* engine, Profile profile, cuda::Address memory, size_t bytes,
                 cuda::Stream stream)
    : layout_(&api.layout()) {
  said.clear();
  context_ = Shell(call<void*>(engine, layout_->engine.create_context, kUserManaged));
  if (!context_) {
    throw Unavailable(api.edition().title,
                      "got " + reasons() + ", expected a context of the engine",
                      "Look for free memory of the GPU");
  }
  if (!call<bool>(context_.behind(), layout_->context.set_profile, static_cast<int32_t>(profile),
                  stream)) {
    throw Error(api.edition().title, "got " + reasons() + ", expected the engine's profile",
                "Build the engine again");
  }
  call<void>(context_.behind(), layout_->context.set_memory, reinterpret_cast<void*>(memory),
             static_cast<int64_t>(bytes));
}

void Context::shape(const std::string& name, const std::vector<int64_t>& sizes) {
  Dims dims{};
  dims.nbDims = static_cast<int32_t>(sizes.size());
  std::copy(sizes.begin(), sizes.end(), dims.d);
  said.clear();
  if (call<bool>(context_.behind(), layout_->context.set_shape, name.c_str(),
                 static_cast<const Dims*>(&dims))) {
    return;
  }
  throw Error(name, "got " + reasons() + ", expected the engine to take " + text_of(sizes),
              "Build the engine with a larger --max-batch or --max-seq");
}

void Context::address(const std::string& name, cuda::Address address) {
  said.clear();
  if (call<bool>(context_.behind(), layout_->context.set_address, name.c_str(),
                 reinterpret_cast<void*>(address))) {
    return;
  }
  throw Error(name, "got " + reasons() + ", expected the engine to take its memory",
              "Build the engine again");
}

void Context::enqueue(cuda::Stream stream) {
  said.clear();
  if (call<bool>(context_.behind(), layout_->context.enqueue, stream)) return;
  throw Error("a call of the engine", "got " + reasons() + ", expected it to run",
              "If the file was not changed, ask for help with this message");
}

// ---- engines

Engine::Engine(const Api& api, const fs::path& file) : api_(api), where_(file.string()) {
  const std::string title = std::string(api.edition().title) + " " + api.version();
  said.clear();
  runtime_ = Shell(api.create_runtime());
  if (!runtime_) {
    throw Error(title, "got " + reasons() + ", expected a runtime",
                "Look whether nvidia-smi shows the GPU and a driver of this TensorRT's CUDA");
  }
  const std::string bytes = read_file(where_, "Build the engine again");
  engine_ = Shell(call<void*>(runtime_.behind(), api.layout().runtime.deserialize_engine,
                              static_cast<const void*>(bytes.data()), bytes.size()));
  if (!engine_) {
    throw Error(where_,
                "got " + reasons() + " from " + title + ", expected an engine that it takes",
                "Build the engine again on this machine");
  }
  const auto& places = api.layout().engine;
  void* engine = engine_.behind();
  const auto count = call<int32_t>(engine, places.tensors);
  for (int32_t i = 0; i < count; ++i) {
    const auto* name = call<const char*>(engine, places.tensor_name, i);
    TensorType tensor;
    tensor.type = element_type(call<DataType>(engine, places.tensor_type, name));
    tensor.dims = sizes_of(call<Dims>(engine, places.tensor_shape, name));
    const bool input = call<int32_t>(engine, places.tensor_mode, name) == kInput;
    (input ? inputs_ : outputs_).emplace(name, std::move(tensor));
  }
  constexpr int32_t kProfiles = 2;
  if (const auto profiles = call<int32_t>(engine, places.profiles); profiles != kProfiles) {
    throw Error(where_,
                "got " + std::to_string(profiles) + " profiles, expected prefill and decode",
                "Build the engine again");
  }
}

int64_t Engine::most(const std::string& input, Profile profile, size_t dimension) const {
  const auto dims = sizes_of(call<Dims>(engine_.behind(), api_.layout().engine.profile_shape,
                                        input.c_str(), static_cast<int32_t>(profile), kMax));
  if (dimension < dims.size() && dims[dimension] > 0) return dims[dimension];
  throw Error(where_, "got no largest size of " + input + ", expected one in each profile",
              "Build the engine again");
}

size_t Engine::memory(Profile profile) const {
  const auto bytes = call<int64_t>(engine_.behind(), api_.layout().engine.profile_memory,
                                   static_cast<int32_t>(profile));
  return static_cast<size_t>(std::max<int64_t>(bytes, 0));
}

Context Engine::context(Profile profile, cuda::Address memory, size_t bytes,
                        cuda::Stream stream) const {
  return Context(api_, engine_.behind(), profile, memory, bytes, stream);
}

}  // namespace anybit::trt
