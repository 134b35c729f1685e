// Stands in TensorRT's place under NVIDIA's Python bindings, and tells which function of which table
// they call: the bindings were compiled with NVIDIA's headers.
#include <array>
#include <cstdint>
#include <cstring>
#include <string>
#include <typeinfo>
#include <utility>

#include "tensorrt/layout.hpp"

namespace {

constexpr int kSlots = 90;

// An object with a table of its own, or a shell that leads to one.
struct Object {
  const void* const* table;
  Object* behind;
  const char* kind;
};

extern Object objects[];
constexpr int kObjects = 7;
std::string heard;
void* answer = nullptr;

// A function that returns Dims gets the room for them in front of its object.
template <int slot>
void* record(Object* object, Object* next) {
  const auto known = [](Object* one) { return one >= objects && one < objects + kObjects; };
  const bool dims = !known(object);
  heard += std::string(dims ? next->kind : object->kind) + " " + std::to_string(slot) + "\n";
  if (!dims) return answer;
  std::memset(static_cast<void*>(object), 0, sizeof(nvinfer1::Dims));
  return object;
}

// Itanium C++ ABI: in front of the functions stand the object's offset in a larger one and its type,
// which the bindings look at.
template <int... slots>
std::array<const void*, 2 + kSlots> table_of(std::integer_sequence<int, slots...>) {
  return {nullptr, &typeid(Object), reinterpret_cast<const void*>(&record<slots>)...};
}

const auto words = table_of(std::make_integer_sequence<int, kSlots>());
const void* const* const table = words.data() + 2;

Object objects[kObjects] = {
    {table, nullptr, "registry"},    {table, nullptr, "runtime"},
    {table, nullptr, "engine"},      {table, nullptr, "context"},
    {table, &objects[1], "a shell"}, {table, &objects[2], "a shell"},
    {table, &objects[3], "a shell"},
};

}  // namespace

#define ENTRY extern "C" __attribute__((visibility("default")))

ENTRY void* getPluginRegistry() { return &objects[0]; }
ENTRY void* createInferRuntime_INTERNAL(void*, int32_t) { return &objects[4]; }

// What the bindings import besides; the test calls none of it.
ENTRY void* createInferRefitter_INTERNAL() { return nullptr; }
ENTRY void* createInferBuilder_INTERNAL() { return nullptr; }
ENTRY void* getBuilderPluginRegistry() { return nullptr; }
ENTRY void* createNvOnnxParser_INTERNAL() { return nullptr; }
ENTRY void* createNvOnnxParserRefitter_INTERNAL() { return nullptr; }
ENTRY int getNvOnnxParserVersion() { return 0; }

// The next calls return a shell ("engine" or "context"), or a text.
ENTRY void will_return(const char* what) {
  answer = std::strcmp(what, "engine") == 0    ? static_cast<void*>(&objects[5])
           : std::strcmp(what, "context") == 0 ? static_cast<void*>(&objects[6])
                                               : const_cast<char*>(what);
}

// Our own numbers, lines "name object slot", of a layout.
ENTRY const char* expected(int major) {
  static std::string told;
  const auto& layout = major == 10 ? anybit::trt::kLayout10 : anybit::trt::kLayout11;
  const auto add = [](const char* name, const char* kind, int slot) {
    told += std::string(name) + " " + kind + " " + std::to_string(slot) + "\n";
  };
  told = "";
  add("load_library", "registry", layout.registry.load_library);
  add("deserialize_engine", "runtime", layout.runtime.deserialize_engine);
  add("create_context", "engine", layout.engine.create_context);
  add("profiles", "engine", layout.engine.profiles);
  add("tensor_shape", "engine", layout.engine.tensor_shape);
  add("tensor_type", "engine", layout.engine.tensor_type);
  add("tensor_mode", "engine", layout.engine.tensor_mode);
  add("profile_shape", "engine", layout.engine.profile_shape);
  add("tensors", "engine", layout.engine.tensors);
  add("tensor_name", "engine", layout.engine.tensor_name);
  add("profile_memory", "engine", layout.engine.profile_memory);
  add("set_profile", "context", layout.context.set_profile);
  add("set_shape", "context", layout.context.set_shape);
  add("set_address", "context", layout.context.set_address);
  add("enqueue", "context", layout.context.enqueue);
  add("set_memory", "context", layout.context.set_memory);
  return told.c_str();
}

// Lines "object slot" since the last call.
ENTRY const char* calls() {
  static std::string told;
  told = std::exchange(heard, "");
  return told.c_str();
}
