// Where TensorRT's runtime keeps the virtual functions that are called here: all that differs between
// TensorRT 10, TensorRT 11 and TensorRT-RTX.
//
// The classes of NvInferRuntime.h are shells: behind a virtual destructor each holds a pointer to an
// object of NvInferImpl.h, to whose virtual functions their inline ones lead. A function is named here
// by its place in that object's table, in which two destructors come first. New versions add functions
// at the end. The numbers are those of NVIDIA's headers (github.com/NVIDIA/TensorRT, include/, releases
// 10.1 to 10.16, 11.0 and 11.1); tests/deploy/runtime/tensorrt compares them with NVIDIA's own Python
// bindings, also with those of TensorRT-RTX, whose headers are not public.
#pragma once
#include "core/tensorrt/abi/logger.h"

namespace anybit::trt {

struct Layout {
  LoggerLayout logger;
  struct {
    int load_library, get_creator;
  } registry;  // which is no shell: its own table
  struct {
    int deserialize_engine;
  } runtime;
  struct {
    int create_context, profiles, tensor_shape, tensor_type, tensor_mode, profile_shape, tensors,
        tensor_name, profile_memory;
  } engine;
  struct {
    int set_profile, set_shape, set_address, enqueue, set_memory;
  } context;
};

constexpr Layout kLayout10{LoggerLayout::kTensorRT10,
                           {10, 14},
                           {3},
                           {5, 10, 19, 20, 23, 29, 30, 31, 53},
                           {17, 21, 24, 37, 49}};
constexpr Layout kLayout11{LoggerLayout::kTensorRT11,
                           {6, 10},
                           {3},
                           {5, 8, 15, 16, 19, 25, 26, 27, 45},
                           {16, 20, 23, 36, 48}};

}  // namespace anybit::trt
