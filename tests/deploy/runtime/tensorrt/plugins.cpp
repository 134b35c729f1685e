// Asks a real TensorRT's registry for our plugins and prints what they answer:
// plugins RUNTIME_LIBRARY PLUGIN_LIBRARY LAYOUT
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "tensorrt/layout.hpp"

using namespace nvinfer1;

namespace {

template <class Result, class... Arguments>
Result call(void* object, int slot, Arguments... arguments) {
  void* const* table = *static_cast<void* const* const*>(object);
  return reinterpret_cast<Result (*)(void*, Arguments...)>(table[slot])(object, arguments...);
}

struct Case {
  const char* op;
  std::vector<int32_t> values;  // wbits, levels, abits, act_symmetric, group_size, K, N, has_bias
  float epsilon;
  int32_t inputs;
  int32_t minimum = 0;
};

const Case kCases[] = {
    {"ABQGemm", {4, 16, 8, 0, 32, 64, 48, 1}, 0, 5},
    {"ABQGemm", {2, 5, 4, 1, 0, 64, 48, 0}, 1e-5f, 5},
    {"ABQGemm", {8, 256, 16, 0, 0, 64, 48, 0}, 0, 4},
    {"ABQGemm", {4, 16, 8, 0, 32, 64, 48, 0}, 0, 4, 1},
    {"QQQGemm", {4, 16, 8, 1, 0, 64, 48, 1}, 0, 4},
    {"QQQGemm", {4, 16, 8, 1, 64, 128, 70, 0}, 1e-5f, 5},
};

template <class Interface>
Interface* part(IPluginV3* plugin, PluginCapabilityType kind) {
  return static_cast<Interface*>(plugin->getCapabilityInterface(kind));
}

// What a plugin writes into an engine.
std::string fields_of(IPluginV3* plugin) {
  const PluginFieldCollection* fields =
      part<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME)->getFieldsToSerialize();
  std::string text;
  for (int32_t i = 0; i < fields->nbFields; ++i) {
    const PluginField& field = fields->fields[i];
    const auto* data = static_cast<const char*>(field.data);
    text += std::string(field.name) + " " + std::to_string(static_cast<int>(field.type)) + " " +
            std::string(data, 4 * static_cast<size_t>(field.length)) + "\n";
  }
  return text;
}

void show(IPluginCreatorV3One* creator, const Case& one) {
  const PluginFieldCollection* names = creator->getFieldNames();
  std::vector<PluginField> fields;
  for (size_t i = 0; i < one.values.size(); ++i) {
    fields.push_back({names->fields[i].name, &one.values[i], PluginFieldType::kINT32, 1});
  }
  if (one.epsilon != 0) {
    fields.push_back({"norm_epsilon", &one.epsilon, PluginFieldType::kFLOAT32, 1});
  }
  if (one.minimum != 0) {
    fields.push_back({"has_minimum", &one.minimum, PluginFieldType::kINT32, 1});
  }
  const PluginFieldCollection given{static_cast<int32_t>(fields.size()), fields.data()};
  IPluginV3* made = creator->createPlugin("layer0", &given, TensorRTPhase::kBUILD);
  if (!made) return void(std::printf("refused\n"));
  IPluginV3* copy = made->clone();
  const std::string written = fields_of(made);
  const PluginFieldCollection* kept =
      part<IPluginV3OneRuntime>(made, PluginCapabilityType::kRUNTIME)->getFieldsToSerialize();
  IPluginV3* read = creator->createPlugin("layer1", kept, TensorRTPhase::kRUNTIME);
  std::printf("%s clone %s, read back %s, x", one.op,
              copy && fields_of(copy) == written ? "equal" : "other",
              read && fields_of(read) == written ? "equal" : "other");
  auto* build = part<IPluginV3OneBuild>(copy, PluginCapabilityType::kBUILD);
  std::vector<DynamicPluginTensorDesc> io(static_cast<size_t>(one.inputs) + 1);
  for (const DataType type :
       {DataType::kFLOAT, DataType::kHALF, DataType::kBF16, DataType::kINT8}) {
    for (DynamicPluginTensorDesc& each : io) each.desc.type = type;
    std::printf(" %d", build->supportsFormatCombination(0, io.data(), one.inputs, 1));
  }
  // Symbolic sizes are opaque to a plugin: it moves the pointers.
  const auto size = [](intptr_t number) { return reinterpret_cast<const IDimensionExpr*>(number); };
  std::vector<DimsExprs> in(static_cast<size_t>(one.inputs), DimsExprs{2, {size(4), size(5)}});
  in[0] = {3, {size(1), size(2), size(3)}};
  DimsExprs out{};
  IExprBuilder& none = *reinterpret_cast<IExprBuilder*>(intptr_t{8});
  std::printf(", shapes %d of",
              build->getOutputShapes(in.data(), one.inputs, nullptr, 0, &out, 1, none));
  for (int32_t i = 0; i < out.nbDims; ++i) {
    std::printf(" %d", static_cast<int>(reinterpret_cast<intptr_t>(out.d[i])));
  }
  std::printf("\n");
  for (IPluginV3* plugin : {made, copy, read}) delete plugin;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  void* const library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  if (!library) return std::printf("%s\n", dlerror()), 3;
  const auto& layout =
      std::strcmp(argv[3], "10") == 0 ? anybit::trt::kLayout10 : anybit::trt::kLayout11;
  void* const registry = reinterpret_cast<void* (*)()>(dlsym(library, "getPluginRegistry"))();
  if (!call<void*>(registry, layout.registry.load_library, static_cast<const char*>(argv[2]))) {
    return std::printf("the plugin library is refused\n"), 4;
  }
  for (const Case& one : kCases) {
    void* const creator = call<void*>(registry, layout.registry.get_creator, one.op, "1", "anybit");
    if (!creator) return std::printf("no creator of %s\n", one.op), 5;
    show(static_cast<IPluginCreatorV3One*>(static_cast<IPluginCreatorInterface*>(creator)), one);
  }
  const auto missing =
      call<void*>(registry, layout.registry.get_creator, "ABQGemm", "1", "elsewhere");
  std::printf("of another namespace: %s\n", missing ? "one" : "none");
  std::fflush(stdout);
  std::_Exit(0);  // TensorRT unloads the plugins by itself, in an order of its own
}
