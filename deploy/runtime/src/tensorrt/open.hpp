// Opens the engine of an artifact.
#pragma once
#include <memory>

#include "artifact.hpp"
#include "opened.hpp"
#include "tensorrt/api.hpp"
#include "tensorrt/cuda.hpp"

namespace anybit::trt {

// The artifact is in order, and this machine is not one for its engine: there is no driver, another
// GPU, or no TensorRT of its version.
class Unfit : public Error {
 public:
  explicit Unfit(const Error& error) : Error(error) {}
};

// What an engine needs of the machine.
struct Ready {
  std::unique_ptr<cuda::Driver> driver;
  std::unique_ptr<Api> api;
};

// Throws Unfit. Throws Error: engine.json is damaged.
Ready find(const Artifact& artifact, const LoadOptions& options);

// Throws Error: a file is missing or damaged, TensorRT refuses the plugins or the engine, it does not
// run, or the GPU has too little memory.
Opened open(const Artifact& artifact, Ready ready, const LoadOptions& options);

}  // namespace anybit::trt
