// Prints what the ABI of the plugin interfaces consists of, one "name value" per line; compiled
// with our header and with NVIDIA's.
#include <NvInferRuntime.h>

#include <cstddef>
#include <cstdio>
#include <cstring>
#include <type_traits>

using namespace nvinfer1;

// Itanium C++ ABI: a pointer to a virtual member function holds 1 + its byte offset in the vtable.
template <class Member>
long slot(Member member) {
  std::ptrdiff_t word;
  std::memcpy(&word, &member, sizeof word);
  return (word - 1) / static_cast<std::ptrdiff_t>(sizeof(void*));
}

#define SIZE(type) std::printf("sizeof " #type " %zu\n", sizeof(type))
#define OFFSET(type, member) \
  std::printf("offset " #type "." #member " %zu\n", offsetof(type, member))
#define VALUE(type, name) \
  std::printf("value " #type "::" #name " %ld\n", static_cast<long>(type::name))
#define SLOT(type, member) std::printf("slot " #type "::" #member " %ld\n", slot(&type::member))
#define TYPE(type, member, expected)             \
  std::printf("type " #type "." #member " %s\n", \
              std::is_same<decltype(type::member), expected>::value ? "as expected" : "other")

// Subclasses that override everything pure: `override` fails to compile where a signature differs.
struct Creator : IPluginCreatorV3One {
  IPluginV3* createPlugin(const char*, const PluginFieldCollection*,
                          TensorRTPhase) noexcept override {
    return nullptr;
  }
  const PluginFieldCollection* getFieldNames() noexcept override { return nullptr; }
  const char* getPluginName() const noexcept override { return ""; }
  const char* getPluginVersion() const noexcept override { return ""; }
  const char* getPluginNamespace() const noexcept override { return ""; }
};
struct Plugin : IPluginV3 {
  IPluginCapability* getCapabilityInterface(PluginCapabilityType) noexcept override {
    return nullptr;
  }
  IPluginV3* clone() noexcept override { return nullptr; }
};
struct Core : IPluginV3OneCore {
  const char* getPluginName() const noexcept override { return ""; }
  const char* getPluginVersion() const noexcept override { return ""; }
  const char* getPluginNamespace() const noexcept override { return ""; }
};
using Desc = PluginTensorDesc;
using Dynamic = DynamicPluginTensorDesc;
struct Build : IPluginV3OneBuild {
  int32_t configurePlugin(const Dynamic*, int32_t, const Dynamic*, int32_t) noexcept override {
    return 0;
  }
  int32_t getOutputDataTypes(DataType*, int32_t, const DataType*, int32_t) const noexcept override {
    return 0;
  }
  int32_t getOutputShapes(const DimsExprs*, int32_t, const DimsExprs*, int32_t, DimsExprs*, int32_t,
                          IExprBuilder&) noexcept override {
    return 0;
  }
  bool supportsFormatCombination(int32_t, const Dynamic*, int32_t, int32_t) noexcept override {
    return false;
  }
  int32_t getNbOutputs() const noexcept override { return 1; }
  size_t getWorkspaceSize(const Dynamic*, int32_t, const Dynamic*,
                          int32_t) const noexcept override {
    return 0;
  }
  int32_t getValidTactics(int32_t*, int32_t) noexcept override { return 0; }
  int32_t getNbTactics() noexcept override { return 0; }
  const char* getTimingCacheID() noexcept override { return nullptr; }
  int32_t getFormatCombinationLimit() noexcept override { return 1; }
  const char* getMetadataString() noexcept override { return nullptr; }
};
struct Runtime : IPluginV3OneRuntime {
  int32_t setTactic(int32_t) noexcept override { return 0; }
  int32_t onShapeChange(const Desc*, int32_t, const Desc*, int32_t) noexcept override { return 0; }
  int32_t enqueue(const Desc*, const Desc*, const void* const*, void* const*, void*,
                  cudaStream_t) noexcept override {
    return 0;
  }
  IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return nullptr; }
  const PluginFieldCollection* getFieldsToSerialize() noexcept override { return nullptr; }
};

template <class Class>
void info(const char* name) {
  Class object;
  const InterfaceInfo of = object.getInterfaceInfo();
  std::printf("info %s %s %d.%d language %d\n", name, of.kind, of.major, of.minor,
              static_cast<int>(object.getAPILanguage()));
}

// clang-format off
void layouts() {
  SIZE(InterfaceInfo); OFFSET(InterfaceInfo, kind); OFFSET(InterfaceInfo, major);
  OFFSET(InterfaceInfo, minor);
  SIZE(Dims64); OFFSET(Dims64, nbDims); OFFSET(Dims64, d); VALUE(Dims64, MAX_DIMS); SIZE(Dims);
  SIZE(PluginTensorDesc); OFFSET(PluginTensorDesc, dims); OFFSET(PluginTensorDesc, type);
  OFFSET(PluginTensorDesc, format);
  OFFSET(PluginTensorDesc, scale); TYPE(PluginTensorDesc, scale, float);
  SIZE(DynamicPluginTensorDesc); OFFSET(DynamicPluginTensorDesc, desc);
  OFFSET(DynamicPluginTensorDesc, min);
  OFFSET(DynamicPluginTensorDesc, max); OFFSET(DynamicPluginTensorDesc, opt);
  SIZE(PluginField); OFFSET(PluginField, name); OFFSET(PluginField, data);
  OFFSET(PluginField, type); OFFSET(PluginField, length);
  SIZE(PluginFieldCollection); OFFSET(PluginFieldCollection, nbFields);
  OFFSET(PluginFieldCollection, fields);
  SIZE(DimsExprs); OFFSET(DimsExprs, nbDims); OFFSET(DimsExprs, d);
  SIZE(IPluginV3); SIZE(IPluginV3OneCore); SIZE(IPluginV3OneBuild); SIZE(IPluginV3OneRuntime);
  SIZE(IPluginCreatorV3One);
}

void values() {
  VALUE(APILanguage, kCPP); VALUE(APILanguage, kPYTHON);
  VALUE(DataType, kFLOAT); VALUE(DataType, kHALF); VALUE(DataType, kINT8); VALUE(DataType, kINT32);
  VALUE(DataType, kBOOL);
  VALUE(DataType, kUINT8); VALUE(DataType, kFP8); VALUE(DataType, kBF16); VALUE(DataType, kINT64);
  VALUE(DataType, kINT4);
  VALUE(TensorFormat, kLINEAR);
  VALUE(PluginFieldType, kFLOAT16); VALUE(PluginFieldType, kFLOAT32);
  VALUE(PluginFieldType, kFLOAT64); VALUE(PluginFieldType, kINT8);
  VALUE(PluginFieldType, kINT16); VALUE(PluginFieldType, kINT32); VALUE(PluginFieldType, kCHAR);
  VALUE(PluginFieldType, kDIMS);
  VALUE(PluginFieldType, kUNKNOWN); VALUE(PluginFieldType, kBF16); VALUE(PluginFieldType, kINT64);
  VALUE(PluginFieldType, kFP8);
  VALUE(TensorRTPhase, kBUILD); VALUE(TensorRTPhase, kRUNTIME);
  VALUE(PluginCapabilityType, kCORE); VALUE(PluginCapabilityType, kBUILD);
  VALUE(PluginCapabilityType, kRUNTIME);
  VALUE(IPluginV3OneBuild, kDEFAULT_FORMAT_COMBINATION_LIMIT);
}

void slots() {
  SLOT(IVersionedInterface, getAPILanguage); SLOT(IVersionedInterface, getInterfaceInfo);
  SLOT(IPluginV3, getCapabilityInterface); SLOT(IPluginV3, clone);
  SLOT(IPluginV3OneCore, getPluginName); SLOT(IPluginV3OneCore, getPluginVersion);
  SLOT(IPluginV3OneCore, getPluginNamespace);
  SLOT(IPluginV3OneBuild, configurePlugin); SLOT(IPluginV3OneBuild, getOutputDataTypes);
  SLOT(IPluginV3OneBuild, getOutputShapes);
  SLOT(IPluginV3OneBuild, supportsFormatCombination); SLOT(IPluginV3OneBuild, getNbOutputs);
  SLOT(IPluginV3OneBuild, getWorkspaceSize); SLOT(IPluginV3OneBuild, getValidTactics);
  SLOT(IPluginV3OneBuild, getNbTactics);
  SLOT(IPluginV3OneBuild, getTimingCacheID); SLOT(IPluginV3OneBuild, getFormatCombinationLimit);
  SLOT(IPluginV3OneBuild, getMetadataString);
  SLOT(IPluginV3OneRuntime, setTactic); SLOT(IPluginV3OneRuntime, onShapeChange);
  SLOT(IPluginV3OneRuntime, enqueue);
  SLOT(IPluginV3OneRuntime, attachToContext); SLOT(IPluginV3OneRuntime, getFieldsToSerialize);
  SLOT(IPluginCreatorV3One, createPlugin); SLOT(IPluginCreatorV3One, getFieldNames);
  SLOT(IPluginCreatorV3One, getPluginName);
  SLOT(IPluginCreatorV3One, getPluginVersion); SLOT(IPluginCreatorV3One, getPluginNamespace);
}
// clang-format on

int main() {
  layouts();
  values();
  slots();
  info<Creator>("IPluginCreatorV3One");
  info<Plugin>("IPluginV3");
  info<Core>("IPluginV3OneCore");
  info<Build>("IPluginV3OneBuild");
  info<Runtime>("IPluginV3OneRuntime");
}
