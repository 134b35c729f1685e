// The part of TensorRT's C++ plugin interface that our plugins use; no package
// registry ships NVIDIA's headers.
//
// What is fixed by the ABI, and therefore equal to NVIDIA's: names (they are mangled into RTTI),
// the order of virtual functions, the layout of structs, enum values, the strings and versions that
// getInterfaceInfo returns. Everything else is left out. These interfaces are the same in TensorRT
// 10.0 to 11.x and TensorRT-RTX 1.7; tests/plugins/test_trt_headers.py compares them with real
// headers where it finds some. CMake takes the real SDK's header of this name instead when
// -DTENSORRT_ROOT points at one.
#pragma once

#include <cstddef>
#include <cstdint>

struct CUstream_st;
// the same alias as in CUDA's driver_types.h, which may be included too
using cudaStream_t = CUstream_st*;

namespace nvinfer1 {

using AsciiChar = char;
using InterfaceKind = const char*;

// ---- plain data ----

enum class APILanguage : int32_t { kCPP = 0, kPYTHON = 1 };

// clang-format off
enum class DataType : int32_t {
  kFLOAT = 0, kHALF = 1, kINT8 = 2, kINT32 = 3, kBOOL = 4,
  kUINT8 = 5, kFP8 = 6, kBF16 = 7, kINT64 = 8, kINT4 = 9,
};

// the vectorised formats are of no use to a GEMM
enum class TensorFormat : int32_t { kLINEAR = 0 };

enum class PluginFieldType : int32_t {
  kFLOAT16 = 0, kFLOAT32 = 1, kFLOAT64 = 2, kINT8 = 3, kINT16 = 4, kINT32 = 5, kCHAR = 6,
  kDIMS = 7, kUNKNOWN = 8, kBF16 = 9, kINT64 = 10, kFP8 = 11,
};

// clang-format on
enum class TensorRTPhase : int32_t { kBUILD = 0, kRUNTIME = 1 };

enum class PluginCapabilityType : int32_t { kCORE = 0, kBUILD = 1, kRUNTIME = 2 };

class InterfaceInfo {
 public:
  InterfaceKind kind;
  int32_t major;
  int32_t minor;
};

class Dims64 {
 public:
  static constexpr int32_t MAX_DIMS{8};
  int32_t nbDims;       // -1: unknown rank
  int64_t d[MAX_DIMS];  // -1: dynamic
};
using Dims = Dims64;

struct PluginTensorDesc {
  Dims dims;
  DataType type;
  TensorFormat format;
  float scale;
};

struct DynamicPluginTensorDesc {
  PluginTensorDesc desc;  // dims hold -1 where dynamic
  Dims min;
  Dims max;
  Dims opt;
};

class PluginField {
 public:
  PluginField(const AsciiChar* fieldName = nullptr, const void* fieldData = nullptr,
              PluginFieldType fieldType = PluginFieldType::kUNKNOWN, int32_t count = 0) noexcept
      : name(fieldName), data(fieldData), type(fieldType), length(count) {}

  const AsciiChar* name;
  const void* data;
  PluginFieldType type;
  int32_t length;  // number of elements at data
};

struct PluginFieldCollection {
  int32_t nbFields{};
  const PluginField* fields{};
};

// ---- what TensorRT hands us and we only pass around ----

class IDimensionExpr;  // a symbolic dimension
class IExprBuilder;
class IPluginResourceContext;

class DimsExprs {
 public:
  int32_t nbDims;
  const IDimensionExpr* d[Dims::MAX_DIMS];
};

// ---- interfaces that we implement; the order of the virtual functions is the ABI ----

class IVersionedInterface {
 public:
  virtual APILanguage getAPILanguage() const noexcept { return APILanguage::kCPP; }
  virtual InterfaceInfo getInterfaceInfo() const noexcept = 0;
  virtual ~IVersionedInterface() noexcept = default;

 protected:
  IVersionedInterface() = default;
  IVersionedInterface(const IVersionedInterface&) = default;
  IVersionedInterface& operator=(const IVersionedInterface&) & = default;
};

namespace v_1_0 {

class IPluginCapability : public IVersionedInterface {};

class IPluginCreatorInterface : public IVersionedInterface {};

class IPluginV3 : public IVersionedInterface {
 public:
  InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN", 1, 0}; }

  virtual IPluginCapability* getCapabilityInterface(PluginCapabilityType kind) noexcept = 0;
  virtual IPluginV3* clone() noexcept = 0;
};

class IPluginV3OneCore : public IPluginCapability {
 public:
  InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN_V3ONE_CORE", 1, 0}; }

  virtual const AsciiChar* getPluginName() const noexcept = 0;
  virtual const AsciiChar* getPluginVersion() const noexcept = 0;
  virtual const AsciiChar* getPluginNamespace() const noexcept = 0;
};

class IPluginV3OneBuild : public IPluginCapability {
 public:
  static constexpr int32_t kDEFAULT_FORMAT_COMBINATION_LIMIT = 100;

  InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN_V3ONE_BUILD", 1, 0}; }

  virtual int32_t configurePlugin(const DynamicPluginTensorDesc* in, int32_t nbIn,
                                  const DynamicPluginTensorDesc* out, int32_t nbOut) noexcept = 0;
  virtual int32_t getOutputDataTypes(DataType* out, int32_t nbOut, const DataType* in,
                                     int32_t nbIn) const noexcept = 0;
  virtual int32_t getOutputShapes(const DimsExprs* in, int32_t nbIn, const DimsExprs* shapeIn,
                                  int32_t nbShapeIn, DimsExprs* out, int32_t nbOut,
                                  IExprBuilder& builder) noexcept = 0;
  virtual bool supportsFormatCombination(int32_t pos, const DynamicPluginTensorDesc* inOut,
                                         int32_t nbIn, int32_t nbOut) noexcept = 0;
  virtual int32_t getNbOutputs() const noexcept = 0;
  virtual size_t getWorkspaceSize(const DynamicPluginTensorDesc* /*in*/, int32_t /*nbIn*/,
                                  const DynamicPluginTensorDesc* /*out*/,
                                  int32_t /*nbOut*/) const noexcept {
    return 0;
  }
  virtual int32_t getValidTactics(int32_t* /*tactics*/, int32_t /*nbTactics*/) noexcept {
    return 0;
  }
  virtual int32_t getNbTactics() noexcept { return 0; }
  virtual const char* getTimingCacheID() noexcept { return nullptr; }
  virtual int32_t getFormatCombinationLimit() noexcept { return kDEFAULT_FORMAT_COMBINATION_LIMIT; }
  virtual const char* getMetadataString() noexcept { return nullptr; }
};

class IPluginV3OneRuntime : public IPluginCapability {
 public:
  InterfaceInfo getInterfaceInfo() const noexcept override {
    return {"PLUGIN_V3ONE_RUNTIME", 1, 0};
  }

  virtual int32_t setTactic(int32_t /*tactic*/) noexcept { return 0; }
  virtual int32_t onShapeChange(const PluginTensorDesc* in, int32_t nbIn,
                                const PluginTensorDesc* out, int32_t nbOut) noexcept = 0;
  virtual int32_t enqueue(const PluginTensorDesc* inDesc, const PluginTensorDesc* outDesc,
                          const void* const* in, void* const* out, void* workspace,
                          cudaStream_t stream) noexcept = 0;
  virtual IPluginV3* attachToContext(IPluginResourceContext* context) noexcept = 0;
  virtual const PluginFieldCollection* getFieldsToSerialize() noexcept = 0;
};

class IPluginCreatorV3One : public IPluginCreatorInterface {
 public:
  InterfaceInfo getInterfaceInfo() const noexcept override {
    return {"PLUGIN CREATOR_V3ONE", 1, 0};
  }

  virtual IPluginV3* createPlugin(const AsciiChar* name, const PluginFieldCollection* fields,
                                  TensorRTPhase phase) noexcept = 0;
  virtual const PluginFieldCollection* getFieldNames() noexcept = 0;
  virtual const AsciiChar* getPluginName() const noexcept = 0;
  virtual const AsciiChar* getPluginVersion() const noexcept = 0;
  virtual const AsciiChar* getPluginNamespace() const noexcept = 0;
};

}  // namespace v_1_0

using IPluginCapability = v_1_0::IPluginCapability;
using IPluginCreatorInterface = v_1_0::IPluginCreatorInterface;
using IPluginV3 = v_1_0::IPluginV3;
using IPluginV3OneCore = v_1_0::IPluginV3OneCore;
using IPluginV3OneBuild = v_1_0::IPluginV3OneBuild;
using IPluginV3OneRuntime = v_1_0::IPluginV3OneRuntime;
using IPluginCreatorV3One = v_1_0::IPluginCreatorV3One;

}  // namespace nvinfer1
