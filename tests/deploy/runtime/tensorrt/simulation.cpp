// Plays TensorRT and the CUDA driver in one library, so that the backend for GPUs runs without one.
//
// The tables of functions have TensorRT's layout, the memory of the GPU is the machine's, and a step
// is computed by ONNX Runtime with the native kernels, whose tokens are then to be the engine's too.
// What is put into a stream runs when somebody waits for it, and not before: what does not wait, or
// writes too early, shows. Rules that TensorRT and CUDA have are checked in each call.
//
// Environment: ANYBIT_SIM_VERSION, such as 10.15.1.29 (1.x is TensorRT-RTX); ANYBIT_SIM_GPU, its
// compute capability, "" for none; ANYBIT_SIM_NO_CAPTURE, to refuse recording; ANYBIT_SIM_MEMORY, bytes
// that are free at first.
// An engine is the JSON that test_backend.py writes; a plugin library a list of names.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "onnxruntime/graph.hpp"
#include "onnxruntime/session.hpp"
#include "tensorrt/layout.hpp"

#define ENTRY extern "C" __attribute__((visibility("default")))

namespace {

using anybit::Tensors;
using anybit::ort::ElementType;
using anybit::trt::Layout;
using nvinfer1::DataType;
using nvinfer1::Dims;
using Json = nlohmann::json;

std::string environment(const char* name, const char* otherwise = "") {
  const char* value = std::getenv(name);
  return value ? value : otherwise;
}

// ---------------------------------------------------------------- planned faults

constexpr int kSuccess = 0, kNoDevice = 100, kInvalidContext = 201, kInvalidValue = 1,
              kStreamIsCapturing = 900, kIllegalAddress = 700;

struct Fault {
  std::string function;
  int countdown = 0, status = 0;
  bool sticky = false;
} fault;
std::map<std::string, int> counts;  // calls of each function since the last plan
int broken = kSuccess;              // what every call returns since a failure that stays

// Whether this call is the one to fail.
bool fails(const char* function) {
  ++counts[function];
  if (fault.function != function || --fault.countdown != 0) return false;
  if (fault.sticky) broken = fault.status;
  return true;
}

// ---------------------------------------------------------------- the driver

constexpr size_t kAlignment = 256;
int context_made = 0;
thread_local bool current = false;
std::map<uint64_t, size_t> device_memory, pinned_memory;

bool inside(const std::map<uint64_t, size_t>& memory, uint64_t address, size_t bytes) {
  auto found = memory.upper_bound(address);
  if (found == memory.begin()) return false;
  --found;
  return address + bytes <= found->first + found->second;
}

using Work = std::function<int()>;

struct FakeStream {
  std::deque<Work> work;
  bool capturing = false, spoiled = false;
};
struct FakeGraph {
  std::deque<Work> work;
};
std::set<FakeStream*> streams;
std::set<FakeGraph*> graphs;                                    // and what is instantiated of them
constexpr size_t kGraphBytes = 20'000, kContextBytes = 30'000;  // of the GPU's memory, of each
size_t contexts = 0;

int put(FakeStream* stream, Work work) {
  stream->work.push_back(std::move(work));
  return kSuccess;
}

// A call of a function that needs the GPU.
#define DRIVER_CALL(name)                \
  if (broken != kSuccess) return broken; \
  if (fails(name)) return fault.status;  \
  if (!current) return kInvalidContext

}  // namespace

ENTRY int cuInit(unsigned) {
  if (fails("cuInit")) return fault.status;
  return environment("ANYBIT_SIM_GPU", "9.0").empty() ? kNoDevice : kSuccess;
}
ENTRY int cuDeviceGetCount(int* count) {
  *count = 1;
  return fails("cuDeviceGetCount") ? fault.status : kSuccess;
}
ENTRY int cuDeviceGet(int* device, int index) {
  *device = index;
  return fails("cuDeviceGet") ? fault.status : kSuccess;
}
ENTRY int cuDeviceGetName(char* name, int size, int) {
  std::strncpy(name, "a simulated GPU", static_cast<size_t>(size));
  return fails("cuDeviceGetName") ? fault.status : kSuccess;
}
ENTRY int cuDeviceGetAttribute(int* value, int attribute, int) {
  const std::string capability = environment("ANYBIT_SIM_GPU", "9.0");
  const size_t dot = capability.find('.');
  *value = std::stoi(attribute == 75 ? capability.substr(0, dot) : capability.substr(dot + 1));
  return fails("cuDeviceGetAttribute") ? fault.status : kSuccess;
}
ENTRY int cuDevicePrimaryCtxRetain(void** context, int) {
  if (fails("cuDevicePrimaryCtxRetain")) return fault.status;
  *context = &context_made;
  ++context_made;
  return kSuccess;
}
ENTRY int cuDevicePrimaryCtxRelease_v2(int) {
  --context_made;
  return kSuccess;
}
ENTRY int cuCtxSetCurrent(void* context) {
  if (broken != kSuccess) return broken;
  if (fails("cuCtxSetCurrent")) return fault.status;
  current = context != nullptr;
  return kSuccess;
}
ENTRY int cuCtxGetCurrent(void** context) {
  if (fails("cuCtxGetCurrent")) return fault.status;
  *context = current ? &context_made : nullptr;
  return kSuccess;
}
ENTRY int cuStreamSynchronize(FakeStream* stream);
ENTRY int cuCtxSynchronize() {
  if (broken != kSuccess) return broken;
  for (FakeStream* stream : streams) {
    while (!stream->work.empty()) {
      stream->work.front()();
      stream->work.pop_front();
    }
  }
  return kSuccess;
}
ENTRY int cuMemGetInfo_v2(size_t* free, size_t* total) {
  DRIVER_CALL("cuMemGetInfo_v2");
  *total = std::stoul(environment("ANYBIT_SIM_MEMORY", "1000000000"));
  size_t taken = graphs.size() * kGraphBytes + contexts * kContextBytes;
  for (const auto& [address, bytes] : device_memory) taken += bytes;
  *free = *total - std::min(*total, taken);
  return kSuccess;
}
ENTRY int cuMemAlloc_v2(uint64_t* address, size_t bytes) {
  DRIVER_CALL("cuMemAlloc_v2");
  if (bytes == 0) return kInvalidValue;
  void* made = std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
  std::memset(made, 0xff, bytes);  // NaN: nobody may read what was not written
  *address = reinterpret_cast<uint64_t>(made);
  device_memory[*address] = bytes;
  return kSuccess;
}
ENTRY int cuMemFree_v2(uint64_t address) {
  if (device_memory.erase(address) == 0) return kInvalidValue;
  std::free(reinterpret_cast<void*>(address));
  return kSuccess;
}
ENTRY int cuMemHostAlloc(void** memory, size_t bytes, unsigned) {
  DRIVER_CALL("cuMemHostAlloc");
  *memory = std::malloc(bytes);
  pinned_memory[reinterpret_cast<uint64_t>(*memory)] = bytes;
  return kSuccess;
}
ENTRY int cuMemFreeHost(void* memory) {
  if (pinned_memory.erase(reinterpret_cast<uint64_t>(memory)) == 0) return kInvalidValue;
  std::free(memory);
  return kSuccess;
}
ENTRY int cuStreamCreate(FakeStream** stream, unsigned) {
  DRIVER_CALL("cuStreamCreate");
  *stream = *streams.insert(new FakeStream).first;
  return kSuccess;
}
ENTRY int cuStreamDestroy_v2(FakeStream* stream) {
  if (streams.erase(stream) == 0) return kInvalidValue;
  delete stream;
  return kSuccess;
}
ENTRY int cuStreamSynchronize(FakeStream* stream) {
  DRIVER_CALL("cuStreamSynchronize");
  if (stream->capturing) {
    stream->spoiled = true;
    return kStreamIsCapturing;
  }
  int status = kSuccess;
  while (!stream->work.empty()) {
    const int done = stream->work.front()();
    stream->work.pop_front();
    if (status == kSuccess) status = done;
  }
  if (status != kSuccess) broken = status;
  return status;
}
ENTRY int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, FakeStream* stream) {
  DRIVER_CALL("cuMemcpyHtoDAsync_v2");
  if (!inside(device_memory, to, bytes)) return kInvalidValue;
  return put(stream, [=] {
    std::memcpy(reinterpret_cast<void*>(to), from, bytes);
    return kSuccess;
  });
}
ENTRY int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, FakeStream* stream) {
  DRIVER_CALL("cuMemcpyDtoHAsync_v2");
  if (!inside(device_memory, from, bytes) ||
      !inside(pinned_memory, reinterpret_cast<uint64_t>(to), bytes)) {
    return kInvalidValue;
  }
  return put(stream, [=] {
    std::memcpy(to, reinterpret_cast<const void*>(from), bytes);
    return kSuccess;
  });
}
ENTRY int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, FakeStream* stream) {
  DRIVER_CALL("cuMemcpyDtoDAsync_v2");
  if (!inside(device_memory, from, bytes) || !inside(device_memory, to, bytes)) {
    return kInvalidValue;
  }
  return put(stream, [=] {
    std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes);
    return kSuccess;
  });
}
ENTRY int cuMemsetD8Async(uint64_t to, unsigned char value, size_t bytes, FakeStream* stream) {
  DRIVER_CALL("cuMemsetD8Async");
  if (!inside(device_memory, to, bytes)) return kInvalidValue;
  return put(stream, [=] {
    std::memset(reinterpret_cast<void*>(to), value, bytes);
    return kSuccess;
  });
}
ENTRY int cuStreamBeginCapture_v2(FakeStream* stream, int) {
  DRIVER_CALL("cuStreamBeginCapture_v2");
  if (!environment("ANYBIT_SIM_NO_CAPTURE").empty()) return 801;  // not supported
  if (stream->capturing || !stream->work.empty()) return kInvalidValue;
  stream->capturing = true;
  stream->spoiled = false;
  return kSuccess;
}
ENTRY int cuStreamEndCapture(FakeStream* stream, FakeGraph** graph) {
  *graph = nullptr;
  const bool good = stream->capturing && !stream->spoiled;
  std::deque<Work> recorded;
  if (stream->capturing) recorded.swap(stream->work);
  stream->capturing = false;
  DRIVER_CALL("cuStreamEndCapture");
  if (!good) return 901;  // invalidated
  *graph = *graphs.insert(new FakeGraph{std::move(recorded)}).first;
  return kSuccess;
}
ENTRY int cuGraphInstantiateWithFlags(FakeGraph** exec, FakeGraph* graph, unsigned long long) {
  DRIVER_CALL("cuGraphInstantiateWithFlags");
  *exec = *graphs.insert(new FakeGraph(*graph)).first;
  return kSuccess;
}
ENTRY int cuGraphLaunch(FakeGraph* exec, FakeStream* stream) {
  DRIVER_CALL("cuGraphLaunch");
  for (const Work& work : exec->work) stream->work.push_back(work);
  return kSuccess;
}
ENTRY int cuGraphDestroy(FakeGraph* graph) {
  if (graphs.erase(graph) == 0) return kInvalidValue;
  delete graph;
  return kSuccess;
}
ENTRY int cuGraphExecDestroy(FakeGraph* exec) { return cuGraphDestroy(exec); }
ENTRY int cuGetErrorName(int status, const char** name) {
  static std::string made;
  made = "ERROR_" + std::to_string(status);
  *name = made.c_str();
  return kSuccess;
}
ENTRY int cuGetErrorString(int, const char** text) {
  *text = "a simulated failure";
  return kSuccess;
}

// ---------------------------------------------------------------- TensorRT

namespace {

struct Version {
  int parts[4] = {};
  Version() {
    std::sscanf(environment("ANYBIT_SIM_VERSION", "10.15.1.29").c_str(), "%d.%d.%d.%d", parts,
                parts + 1, parts + 2, parts + 3);
  }
};

const Layout& layout() {
  return Version().parts[0] == 10 ? anybit::trt::kLayout10 : anybit::trt::kLayout11;
}

using Table = std::vector<const void*>;

void unexpected() {
  std::fputs("simulation: got a call of a function that it does not have\n", stderr);
  std::abort();
}

std::atomic<int> live{0};  // shells

struct Shell {
  const void* const* table;
  void* behind;
  std::function<void()> destroy;
};

template <class Function>
const void* place(Function* function) {
  return reinterpret_cast<const void*>(function);
}

void destroy_shell(Shell* shell) {
  shell->destroy();
  delete shell;
  --live;
}

// The object behind a shell begins with its table.
template <class Inner>
Shell* make_shell(std::unique_ptr<Inner> inner, const Table& table) {
  static const Table shells{place(&unexpected), place(&destroy_shell)};
  Inner* raw = inner.release();
  raw->table = table.data();
  ++live;
  return new Shell{shells.data(), raw, [raw] { delete raw; }};
}

void* the_logger = nullptr;

void say(const std::string& text) {
  using namespace anybit::trt;
  if (layout().logger == LoggerLayout::kTensorRT10) {
    static_cast<Logger10*>(the_logger)->log(Severity::kError, text.c_str());
  } else {
    static_cast<Logger11*>(the_logger)->log(Severity::kError, text.c_str());
  }
}

// As TensorRT does: false, and the reason in the log.
bool refuse(const std::string& why) {
  say(why);
  return false;
}
bool refused(const char* function) {
  return fails(function) && !refuse(std::string(function) + " fails as planned");
}

struct Engine;

struct Context {
  Context() { ++contexts; }
  Context(const Context&) = delete;
  ~Context() { --contexts; }

  const void* const* table = nullptr;
  const Engine* engine = nullptr;
  int profile = -1;
  std::map<std::string, std::vector<int64_t>> shapes;
  std::map<std::string, uint64_t> addresses;
  size_t memory = 0;
  std::shared_ptr<int> changes = std::make_shared<int>(0);  // set since it was made
};

struct Engine {
  const void* const* table = nullptr;
  Json file;
  anybit::ort::Graph graph;
  std::unique_ptr<anybit::ort::Session> session;
  std::vector<std::string> names;

  bool is_input(const std::string& name) const { return graph.inputs.count(name) > 0; }
  const anybit::TensorType& tensor(const std::string& name) const {
    return is_input(name) ? graph.inputs.at(name) : graph.outputs.at(name);
  }
  std::vector<int64_t> bound(const std::string& name, int profile, const char* which) const {
    return file.at("profiles").at(static_cast<size_t>(profile)).at("inputs").at(name).at(which);
  }
  static int64_t working(int profile) { return profile == 0 ? 4096 : 1024; }
};

struct Runtime {
  const void* const* table = nullptr;
};

Dims dims_of(const std::vector<int64_t>& sizes) {
  Dims dims{};
  dims.nbDims = static_cast<int32_t>(sizes.size());
  std::copy(sizes.begin(), sizes.end(), dims.d);
  return dims;
}

DataType data_type(ElementType type) {
  switch (type) {
    case anybit::ort::kFloat: return DataType::kFLOAT;
    case anybit::ort::kHalf: return DataType::kHALF;
    case anybit::ort::kInt64: return DataType::kINT64;
    default: throw std::runtime_error("a type that no tiny model has");
  }
}

size_t bytes_of(const anybit::TensorType& tensor, const std::vector<int64_t>& shape) {
  size_t bytes = anybit::bytes_of(tensor.type);
  for (const int64_t size : shape) bytes *= static_cast<size_t>(size);
  return bytes;
}

// ---- contexts

bool set_profile(Context* self, int32_t profile, FakeStream*) {
  if (refused("setOptimizationProfileAsync")) return false;
  self->profile = profile;
  return true;
}

bool set_shape(Context* self, const char* name, const Dims* dims) {
  if (refused("setInputShape")) return false;
  ++*self->changes;
  const std::vector<int64_t> shape(dims->d, dims->d + dims->nbDims);
  const auto least = self->engine->bound(name, self->profile, "min");
  const auto most = self->engine->bound(name, self->profile, "max");
  if (shape.size() != most.size()) return refuse(std::string(name) + " has another rank");
  for (size_t i = 0; i < shape.size(); ++i) {
    if (shape[i] < least[i] || shape[i] > most[i]) {
      return refuse(std::string(name) + " is outside of the profile");
    }
  }
  self->shapes[name] = shape;
  return true;
}

bool set_address(Context* self, const char* name, uint64_t address) {
  if (refused("setTensorAddress")) return false;
  ++*self->changes;
  if (address == 0 || address % kAlignment != 0)
    return refuse(std::string(name) + " is not aligned");
  self->addresses[name] = address;
  return true;
}

void set_memory(Context* self, void*, int64_t bytes) { self->memory = static_cast<size_t>(bytes); }

// Shapes of the outputs follow from the inputs'.
std::vector<int64_t> output_shape(const Context& context, const std::string& name) {
  const auto& ids = context.shapes.at("input_ids");
  if (name == "logits") {
    return {ids[0], context.shapes.at("logits_indices")[1],
            context.engine->graph.outputs.at(name).dims[2]};
  }
  auto shape = context.shapes.at("past_key_values." + name.substr(std::strlen("present.")));
  if (context.shapes.count("write_indices") == 0) shape[2] += ids[1];
  return shape;
}

bool enqueue(Context* self, FakeStream* stream) {
  if (refused("enqueueV3")) return false;
  const Engine& engine = *self->engine;
  if (self->memory < static_cast<size_t>(Engine::working(self->profile))) {
    return refuse("too little working memory");
  }
  struct Tensor {
    std::string name;
    ElementType type;
    std::vector<int64_t> shape;
    uint64_t address;
  };
  std::vector<Tensor> inputs, outputs;
  for (const std::string& name : engine.names) {
    const bool input = engine.is_input(name);
    if (input && self->shapes.count(name) == 0) return refuse(name + " has no shape");
    if (self->addresses.count(name) == 0) return refuse(name + " has no address");
    const auto shape = input ? self->shapes.at(name) : output_shape(*self, name);
    const uint64_t address = self->addresses.at(name);
    if (!inside(device_memory, address, bytes_of(engine.tensor(name), shape))) {
      return refuse(name + " is not in the GPU's memory");
    }
    (input ? inputs : outputs).push_back({name, engine.tensor(name).type, shape, address});
  }
  for (const Tensor& output : outputs) {
    const std::string past = "past_key_values." + output.name.substr(output.name.find('.') + 1);
    if (output.name == "logits") continue;
    const bool same = self->addresses.at(past) == output.address;
    if (same != (self->shapes.count("write_indices") > 0)) {
      return refuse(output.name +
                    (same ? " overwrites its past" : " is not at its past's address"));
    }
  }
  return put(stream, [&engine, inputs, outputs, changes = self->changes, then = *self->changes] {
           if (*changes != then) return kIllegalAddress;  // a recorded step of a changed context
           std::vector<const char*> input_names, output_names;
           std::vector<anybit::ort::Value> kept, results;
           std::vector<const OrtValue*> values;
           const auto view = [&](const Tensor& tensor) {
             return engine.session->tensor(tensor.type, tensor.shape,
                                           reinterpret_cast<void*>(tensor.address),
                                           bytes_of({tensor.type, {}}, tensor.shape));
           };
           for (const Tensor& tensor : inputs) {
             kept.push_back(view(tensor));
             input_names.push_back(tensor.name.c_str());
             values.push_back(kept.back().get());
           }
           for (const Tensor& tensor : outputs) {
             results.push_back(view(tensor));
             output_names.push_back(tensor.name.c_str());
           }
           try {
             engine.session->run(input_names, values, output_names, results);
           } catch (const std::exception& error) {
             std::fprintf(stderr, "simulation: %s\n", error.what());
             return kIllegalAddress;
           }
           return kSuccess;
         }) == kSuccess;
}

// ---- engines

Shell* create_context(Engine* self, int32_t strategy) {
  if (refused("createExecutionContext")) return nullptr;
  if (strategy != 2) return refuse("memory is not the user's"), nullptr;
  static const Table table = [] {
    Table made(90, place(&unexpected));
    const auto& places = layout().context;
    made[static_cast<size_t>(places.set_profile)] = place(&set_profile);
    made[static_cast<size_t>(places.set_shape)] = place(&set_shape);
    made[static_cast<size_t>(places.set_address)] = place(&set_address);
    made[static_cast<size_t>(places.enqueue)] = place(&enqueue);
    made[static_cast<size_t>(places.set_memory)] = place(&set_memory);
    return made;
  }();
  auto made = std::make_unique<Context>();
  made->engine = self;
  return make_shell(std::move(made), table);
}

int32_t profiles(Engine* self) { return static_cast<int32_t>(self->file.at("profiles").size()); }
int32_t tensors(Engine* self) { return static_cast<int32_t>(self->names.size()); }
const char* tensor_name(Engine* self, int32_t index) {
  return self->names.at(static_cast<size_t>(index)).c_str();
}
DataType tensor_type(Engine* self, const char* name) { return data_type(self->tensor(name).type); }
Dims tensor_shape(Engine* self, const char* name) { return dims_of(self->tensor(name).dims); }
int32_t tensor_mode(Engine* self, const char* name) { return self->is_input(name) ? 1 : 2; }
Dims profile_shape(Engine* self, const char* name, int32_t profile, int32_t which) {
  const char* const names[] = {"min", "opt", "max"};
  return dims_of(self->bound(name, profile, names[which]));
}
int64_t profile_memory(Engine*, int32_t profile) { return Engine::working(profile); }

Shell* deserialize_engine(Runtime*, const void* bytes, size_t size) {
  if (refused("deserializeCudaEngine")) return nullptr;
  static const Table table = [] {
    Table made(90, place(&unexpected));
    const auto& places = layout().engine;
    made[static_cast<size_t>(places.create_context)] = place(&create_context);
    made[static_cast<size_t>(places.profiles)] = place(&profiles);
    made[static_cast<size_t>(places.tensors)] = place(&tensors);
    made[static_cast<size_t>(places.tensor_name)] = place(&tensor_name);
    made[static_cast<size_t>(places.tensor_type)] = place(&tensor_type);
    made[static_cast<size_t>(places.tensor_shape)] = place(&tensor_shape);
    made[static_cast<size_t>(places.tensor_mode)] = place(&tensor_mode);
    made[static_cast<size_t>(places.profile_shape)] = place(&profile_shape);
    made[static_cast<size_t>(places.profile_memory)] = place(&profile_memory);
    return made;
  }();
  auto made = std::make_unique<Engine>();
  const auto* text = static_cast<const char*>(bytes);
  made->file = Json::parse(text, text + size, nullptr, false);
  if (made->file.is_discarded()) return refuse("the serialized engine is damaged"), nullptr;
  const std::string onnx = made->file.at("onnx");
  made->graph = anybit::ort::read_graph(onnx);
  anybit::ort::Session::Options options;
  options.kernels = made->file.at("kernels").get<std::string>();
  made->session = std::make_unique<anybit::ort::Session>(
      made->file.at("onnxruntime").get<std::string>(), onnx, options);
  for (const auto& [name, tensor] : made->graph.inputs) made->names.push_back(name);
  for (const auto& [name, tensor] : made->graph.outputs) made->names.push_back(name);
  return make_shell(std::move(made), table);
}

// ---- plugins

struct Registry {
  const void* const* table = nullptr;
  std::set<std::string> names;
} registry;

void* load_library(Registry* self, const char* path) {
  if (refused("loadLibrary")) return nullptr;
  std::ifstream file(path);
  for (std::string name; file >> name;) self->names.insert(name);
  return self;
}
void* get_creator(Registry* self, const char* name, const char* version, const char* domain) {
  if (refused("getCreator")) return nullptr;
  const bool known =
      self->names.count(name) > 0 && std::string(version) == "1" && std::string(domain) == "anybit";
  return known ? self : nullptr;
}

}  // namespace

ENTRY int32_t getInferLibMajorVersion() { return Version().parts[0]; }
ENTRY int32_t getInferLibMinorVersion() { return Version().parts[1]; }
ENTRY int32_t getInferLibPatchVersion() { return Version().parts[2]; }
ENTRY int32_t getInferLibBuildVersion() { return Version().parts[3]; }
ENTRY int32_t getInferLibVersion() {
  const Version v;
  return v.parts[0] * 10000 + v.parts[1] * 100 + v.parts[2];
}
ENTRY void* getPluginRegistry() {
  static const Table table = [] {
    Table made(90, place(&unexpected));
    made[static_cast<size_t>(layout().registry.load_library)] = place(&load_library);
    made[static_cast<size_t>(layout().registry.get_creator)] = place(&get_creator);
    return made;
  }();
  registry.table = table.data();
  return &registry;
}
ENTRY void* createInferRuntime_INTERNAL(void* logger, int32_t version) {
  the_logger = logger;
  if (refused("createInferRuntime") || version != getInferLibVersion() || !current) return nullptr;
  static const Table table = [] {
    Table made(90, place(&unexpected));
    made[static_cast<size_t>(layout().runtime.deserialize_engine)] = place(&deserialize_engine);
    return made;
  }();
  return make_shell(std::make_unique<Runtime>(), table);
}

// ---------------------------------------------------------------- for tests

// The `nth` call of a function from now on fails; a CUDA one with this status, and every later one
// too where the failure is sticky.
ENTRY void sim_plan(const char* function, int nth, int status, int sticky) {
  fault = {function, nth, status, sticky != 0};
  counts.clear();
  broken = kSuccess;
}
// How often a function was called since.
ENTRY int sim_calls(const char* function) { return counts[function]; }
// What was made and not freed.
ENTRY int sim_live() {
  return live + context_made +
         static_cast<int>(device_memory.size() + pinned_memory.size() + streams.size() +
                          graphs.size());
}
