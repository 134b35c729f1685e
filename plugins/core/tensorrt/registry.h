// How an op folder makes its plugin known: one static object, no list to edit.
#pragma once
#include <NvInferRuntime.h>

namespace anybit {

// Adds a creator, which lives as long as the library, to what getCreators() returns.
struct Registration {
  explicit Registration(nvinfer1::IPluginCreatorInterface& creator);
};

}  // namespace anybit
