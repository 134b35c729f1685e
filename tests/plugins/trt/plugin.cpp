// Plays TensorRT: makes plugins through getCreators(), calls what a builder and a runtime
// call, and prints the answers. The kernels are replaced by functions that print the
// shape they are called with.
#include <NvInferRuntime.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <string>
#include <vector>

#include "core/host/config.h"
#include "core/host/params.h"

using namespace nvinfer1;

extern "C" IPluginCreatorInterface* const* getCreators(int32_t& count);
extern "C" void setLoggerFinder(void* finder);

namespace {

size_t print_workspace(const char* op, const GemmShape* s) {
  std::printf("%s workspace m %d n %d k %d group %d planes %d dtype %d tactic %d\n", op, s->m, s->n,
              s->k, s->group_size, s->planes, s->dtype, s->tactic);
  return 100 + static_cast<size_t>(s->m);
}

// Kernel 2 for up to 16 tokens, kernel 3 for more; each could run what the other is chosen for.
int list_tactics(const GemmShape* s, int32_t* tactics, int capacity) {
  const int32_t small = anybit::tactic_from_config({2, 5});
  const int32_t large = anybit::tactic_from_config({3, 1});
  const int32_t list[] = {s->m <= 16 ? small : large, s->m <= 16 ? large : small};
  for (int i = 0; i < 2 && i < capacity; ++i) tactics[i] = list[i];
  return 2;
}

void print_tactics(IPluginV3OneBuild* build) {
  std::vector<int32_t> tactics(static_cast<size_t>(build->getNbTactics()));
  std::printf("valid tactics %d", build->getValidTactics(tactics.data(), build->getNbTactics()));
  for (const int32_t tactic : tactics) std::printf(" %d", tactic);
  std::printf("\n");
}

int print_run(const char* op, const GemmShape* s, const GemmBuffers* b, void* stream) {
  const auto id = [](const void* pointer) {
    return static_cast<int>(reinterpret_cast<intptr_t>(pointer));
  };
  std::printf("%s run m %d n %d k %d w%d levels %d a%d symmetric %d dtype %d", op, s->m, s->n, s->k,
              s->wbits, s->levels, s->abits, s->act_symmetric, s->dtype);
  std::printf(
      " x %d weight %d scale %d zero %d scale_group %d bias %d gamma %d y %d workspace %d stream "
      "%d",
      id(b->x), id(b->weight), id(b->scale), id(b->zero), id(b->scale_group), id(b->bias),
      id(b->gamma), id(b->y), id(b->workspace), id(stream));
  if (s->norm_epsilon != 0) std::printf(" norm_epsilon %g", s->norm_epsilon);
  if (s->has_minimum != 0) std::printf(" minimum %d", id(b->minimum));
  std::printf(s->tactic ? " tactic %d\n" : "\n", s->tactic);
  return s->m == 13 ? 999 : 0;
}

Dims dims(std::initializer_list<int64_t> sizes) {
  Dims result{};
  for (const int64_t size : sizes) result.d[result.nbDims++] = size;
  return result;
}

PluginTensorDesc tensor(DataType type, std::initializer_list<int64_t> sizes) {
  return {dims(sizes), type, TensorFormat::kLINEAR, 1.0f};
}

using Sizes = std::initializer_list<int64_t>;
DynamicPluginTensorDesc dynamic(DataType type, Sizes sizes, Sizes least, Sizes most) {
  return {tensor(type, sizes), dims(least), dims(most), dims(most)};
}
DynamicPluginTensorDesc fixed(DataType type, Sizes sizes) {
  return dynamic(type, sizes, sizes, sizes);
}

IPluginCreatorV3One* creator(const char* name) {
  int32_t count = 0;
  IPluginCreatorInterface* const* list = getCreators(count);
  for (int32_t i = 0; i < count; ++i) {
    auto* one = static_cast<IPluginCreatorV3One*>(list[i]);
    if (std::strcmp(one->getPluginName(), name) == 0) return one;
  }
  return nullptr;
}

// From integers, and the norm's epsilon if that is not 0.
IPluginV3* make(const char* name, const std::vector<int32_t>& values, float epsilon) {
  IPluginCreatorV3One* maker = creator(name);
  const PluginFieldCollection* names = maker->getFieldNames();
  std::vector<PluginField> fields;
  for (size_t i = 0; i < values.size(); ++i)
    fields.push_back({names->fields[i].name, &values[i], PluginFieldType::kINT32, 1});
  if (epsilon != 0)
    fields.push_back({names->fields[values.size()].name, &epsilon, PluginFieldType::kFLOAT32, 1});
  const PluginFieldCollection collection{static_cast<int32_t>(fields.size()), fields.data()};
  return maker->createPlugin("layer0", &collection, TensorRTPhase::kBUILD);
}

template <class Interface>
Interface* part(IPluginV3* plugin, PluginCapabilityType kind) {
  return static_cast<Interface*>(plugin->getCapabilityInterface(kind));
}

void* address(int number) { return reinterpret_cast<void*>(static_cast<intptr_t>(number)); }

// `fourth`: type of the input that is zero points or minimums, or of another op's input there.
void enqueue(IPluginV3* plugin, PluginTensorDesc x, size_t inputs,
             DataType fourth = DataType::kINT32) {
  const void* in[] = {address(1), address(2), address(3), address(4), address(5)};
  void* out[] = {address(6)};
  std::vector<PluginTensorDesc> descs(inputs, x);
  descs[3].type = fourth;
  auto* runtime = part<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
  std::printf("shape %d\n",
              runtime->onShapeChange(descs.data(), static_cast<int32_t>(inputs), &x, 1));
  std::printf("status %d\n", runtime->enqueue(descs.data(), &x, in, out, address(7),
                                              static_cast<cudaStream_t>(address(8))));
}

// ABQGemm w2 balanced, a8 asymmetric, groups of 40, K 120, N 8, with bias.
void abq() {
  IPluginV3* plugin = make("ABQGemm", {2, 5, 8, 0, 40, 120, 8, 1}, 0);
  auto* build = part<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
  std::vector<DynamicPluginTensorDesc> io{
      dynamic(DataType::kBF16, {-1, -1, 120}, {1, 1, 120}, {4, 16, 120}),
      fixed(DataType::kINT32, {3, 8, 8}),
      fixed(DataType::kFLOAT, {8, 3}),
      fixed(DataType::kINT32, {8, 3}),
      fixed(DataType::kFLOAT, {8}),
      dynamic(DataType::kBF16, {-1, -1, 8}, {1, 1, 8}, {4, 16, 8})};
  for (int32_t i = 0; i < 6; ++i)
    std::printf("format %d %d\n", i, build->supportsFormatCombination(i, io.data(), 5, 1));
  io[5].desc.type = DataType::kHALF;
  std::printf("other output type %d\n", build->supportsFormatCombination(5, io.data(), 5, 1));
  io[0].desc.type = DataType::kINT8;
  std::printf("int8 activations %d\n", build->supportsFormatCombination(0, io.data(), 5, 1));
  io[0].desc.type = DataType::kFLOAT;
  std::printf("configure %d\n", build->configurePlugin(io.data(), 5, &io[5], 1));
  print_tactics(build);  // the profile's smallest and largest shape want different kernels
  std::printf("workspace %zu\n", build->getWorkspaceSize(io.data(), 5, &io[5], 1));
  std::printf("metadata %s\n", build->getMetadataString());
  io[1].desc.dims = dims({3, 8, 7});
  std::printf("configure wrong weight %d\n", build->configurePlugin(io.data(), 5, &io[5], 1));
  io[0].max = dims({1 << 20, 1 << 20, 120});
  std::printf("configure too many tokens %d\n", build->configurePlugin(io.data(), 5, &io[5], 1));
  io[0].desc.dims = dims({-1, -1, 121});
  std::printf("configure wrong x %d\n", build->configurePlugin(io.data(), 5, &io[5], 1));
  DataType type = DataType::kHALF, out_type = DataType::kFLOAT;
  std::printf("types %d %d\n", build->getOutputDataTypes(&out_type, 1, &type, 1),
              static_cast<int>(out_type));
  IPluginV3* copy = part<IPluginV3OneRuntime>(plugin->clone(), PluginCapabilityType::kRUNTIME)
                        ->attachToContext(nullptr);
  for (const PluginTensorDesc& x :
       {tensor(DataType::kHALF, {120}), tensor(DataType::kHALF, {7, 120}),
        tensor(DataType::kBF16, {2, 3, 120}), tensor(DataType::kFLOAT, {2, 3, 4, 120}),
        tensor(DataType::kHALF, {0, 3, 120}), tensor(DataType::kHALF, {13, 120}),
        tensor(DataType::kHALF, {7, 119})}) {
    enqueue(copy, x, 5);
  }
}

// ABQGemm w4 a8 in groups of 16, K 64, N 8, made again from the fields it serialises: a fourth input
// of floats is minimums, whatever it was before.
void minimum() {
  IPluginV3* built = make("ABQGemm", {4, 16, 8, 0, 16, 64, 8, 0}, 0);
  const PluginFieldCollection* fields =
      part<IPluginV3OneRuntime>(built, PluginCapabilityType::kRUNTIME)->getFieldsToSerialize();
  IPluginV3* plugin = creator("ABQGemm")->createPlugin("layer0", fields, TensorRTPhase::kRUNTIME);
  auto* build = part<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
  std::vector<DynamicPluginTensorDesc> io{
      dynamic(DataType::kHALF, {-1, 64}, {1, 64}, {9, 64}), fixed(DataType::kINT32, {4, 8, 4}),
      fixed(DataType::kFLOAT, {8, 4}), fixed(DataType::kFLOAT, {8, 4}),
      dynamic(DataType::kHALF, {-1, 8}, {1, 8}, {9, 8})};
  for (int32_t i = 0; i < 5; ++i)
    std::printf("format %d %d\n", i, build->supportsFormatCombination(i, io.data(), 4, 1));
  for (const DataType type : {DataType::kINT32, DataType::kHALF, DataType::kFLOAT}) {
    io[3].desc.type = type;
    std::printf("fourth input of type %d %d\n", static_cast<int>(type),
                build->supportsFormatCombination(3, io.data(), 4, 1));
  }
  std::printf("configure %d\n", build->configurePlugin(io.data(), 4, &io[4], 1));
  for (const DataType type : {DataType::kINT32, DataType::kFLOAT, DataType::kHALF}) {
    // integers of the network stay integers, and floats floats
    const DataType types[] = {DataType::kHALF, DataType::kINT32, DataType::kFLOAT, type};
    DataType out_type{};
    IPluginV3* known = plugin->clone();
    part<IPluginV3OneBuild>(known, PluginCapabilityType::kBUILD)
        ->getOutputDataTypes(&out_type, 1, types, 4);
    auto* told = part<IPluginV3OneBuild>(known->clone(), PluginCapabilityType::kBUILD);
    for (const DataType offered : {DataType::kINT32, DataType::kFLOAT}) {
      io[3].desc.type = offered;
      std::printf("type %d for %d of the network %d\n", static_cast<int>(offered),
                  static_cast<int>(type), told->supportsFormatCombination(3, io.data(), 4, 1));
    }
  }
  auto* runtime = part<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
  IPluginV3* copy = runtime->attachToContext(nullptr);
  for (const DataType type : {DataType::kFLOAT, DataType::kINT32, DataType::kFLOAT})
    enqueue(copy, tensor(DataType::kHALF, {5, 64}), 4, type);
}

// QQQGemm in groups of 64, K 128, N 70, with a norm, made again from the fields it
// serialises, as an engine does.
void qqq() {
  IPluginV3* built = make("QQQGemm", {4, 16, 8, 1, 64, 128, 70, 0}, 1e-5f);
  const PluginFieldCollection* fields =
      part<IPluginV3OneRuntime>(built, PluginCapabilityType::kRUNTIME)->getFieldsToSerialize();
  for (int32_t i = 0; i < fields->nbFields; ++i) {
    const PluginField& field = fields->fields[i];
    if (field.type == PluginFieldType::kFLOAT32)
      std::printf("field %s %g\n", field.name, *static_cast<const float*>(field.data));
    else std::printf("field %s %d\n", field.name, *static_cast<const int32_t*>(field.data));
  }
  IPluginV3* plugin = creator("QQQGemm")->createPlugin("layer0", fields, TensorRTPhase::kRUNTIME);
  auto* build = part<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
  std::vector<DynamicPluginTensorDesc> io{dynamic(DataType::kHALF, {-1, 128}, {1, 128}, {9, 128}),
                                          fixed(DataType::kINT32, {8, 256}),
                                          fixed(DataType::kFLOAT, {70, 1}),
                                          fixed(DataType::kHALF, {2, 70}),
                                          fixed(DataType::kHALF, {128}),
                                          dynamic(DataType::kHALF, {-1, 70}, {1, 70}, {9, 70})};
  for (int32_t i = 0; i < 6; ++i)
    std::printf("format %d %d\n", i, build->supportsFormatCombination(i, io.data(), 5, 1));
  io[4].desc.type = DataType::kFLOAT;
  std::printf("gamma of another type than x %d\n",
              build->supportsFormatCombination(4, io.data(), 5, 1));
  io[4].desc.type = DataType::kHALF;
  std::printf("configure %d\n", build->configurePlugin(io.data(), 5, &io[5], 1));
  print_tactics(build);
  std::printf("workspace %zu\n", build->getWorkspaceSize(io.data(), 5, &io[5], 1));
  std::printf("timing %s\n", build->getTimingCacheID());
  std::printf("set tactic %d\n",
              part<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME)->setTactic(197));
  plugin =
      part<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME)->attachToContext(nullptr);
  enqueue(plugin, tensor(DataType::kHALF, {5, 128}), 5);
  auto* core = part<IPluginV3OneCore>(plugin, PluginCapabilityType::kCORE);
  std::printf("plugin %s %s %s outputs %d tactics %d\n", core->getPluginName(),
              core->getPluginVersion(), core->getPluginNamespace(), build->getNbOutputs(),
              build->getNbTactics());
  // Symbolic shapes are opaque to the plugin: it only moves the pointers.
  const auto expression = [](int number) {
    return static_cast<const IDimensionExpr*>(address(number));
  };
  DimsExprs in[5]{{3, {expression(1), expression(2), expression(3)}},
                  {},
                  {2, {expression(4), expression(5)}},
                  {},
                  {}},
      out{};
  IExprBuilder& builder = *static_cast<IExprBuilder*>(address(9));
  std::printf("shapes %d", build->getOutputShapes(in, 5, nullptr, 0, &out, 1, builder));
  for (int32_t i = 0; i < out.nbDims; ++i)
    std::printf(" %d", static_cast<int>(reinterpret_cast<intptr_t>(out.d[i])));
  std::printf("\nshapes of three inputs %d\n",
              build->getOutputShapes(in, 3, nullptr, 0, &out, 1, builder));
  in[0].nbDims = 0;
  std::printf("shapes of a scalar x %d\n",
              build->getOutputShapes(in, 5, nullptr, 0, &out, 1, builder));
  in[0].nbDims = 3, in[2].nbDims = 0;
  std::printf("shapes of a scalar scale %d\n",
              build->getOutputShapes(in, 5, nullptr, 0, &out, 1, builder));
}

// The functions of one op, which print this name.
template <const char* kName>
AnybitOp printing_op(const char* name) {
  AnybitOp op{};
  op.name = name;
  op.workspace = [](const GemmShape* shape) { return print_workspace(kName, shape); };
  op.tactics = list_tactics;
  op.run = [](const GemmShape* shape, const GemmBuffers* buffers, void* stream) {
    return print_run(kName, shape, buffers, stream);
  };
  return op;
}
constexpr char kAbq[] = "abq", kQqq[] = "qqq";

}  // namespace

int anybit_ops(const AnybitOp** ops) {
  static const AnybitOp list[] = {printing_op<kAbq>("ABQGemm"), printing_op<kQqq>("QQQGemm")};
  *ops = list;
  return 2;
}

int main(int argc, char** argv) {
  setLoggerFinder(nullptr);  // errors go to stderr
  if (argc != 2) return 1;
  const std::string which = argv[1];
  which == "abq" ? abq() : which == "qqq" ? qqq() : minimum();
}
