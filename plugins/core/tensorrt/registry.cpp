// The two functions that TensorRT's loadLibrary() looks for in a plugin library.
#include "core/tensorrt/registry.h"

#include <vector>

#include "core/tensorrt/abi/logger.h"

namespace {

// A function's static, so that it exists before the first registration whatever
// the order of the op folders.
std::vector<nvinfer1::IPluginCreatorInterface*>& creators() {
  static std::vector<nvinfer1::IPluginCreatorInterface*> list;
  return list;
}

}  // namespace

anybit::Registration::Registration(nvinfer1::IPluginCreatorInterface& creator) {
  creators().push_back(&creator);
}

#define ANYBIT_ENTRY extern "C" __attribute__((visibility("default")))

ANYBIT_ENTRY nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  count = static_cast<int32_t>(creators().size());
  return creators().data();
}

// TensorRT passes an nvinfer1::ILoggerFinder*; its layout depends on the version
// (core/tensorrt/abi/logger.h), so the type stays open here.
ANYBIT_ENTRY void setLoggerFinder(void* finder) { anybit::trt::set_finder(finder); }
