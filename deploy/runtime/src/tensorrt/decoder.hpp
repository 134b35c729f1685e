// The backend that runs the engine on a GPU.
#pragma once
#include <memory>

#include "backend.hpp"
#include "cache_form.hpp"
#include "tensorrt/api.hpp"
#include "tensorrt/cuda.hpp"

namespace anybit::trt {

struct Sizes {
  int slots = 0;
  int rows = 0;     // most in one call
  int chunk = 0;    // most new tokens of a row
  int context = 0;  // most tokens of a slot
  int vocab = 0;
  size_t working = 0;  // bytes for what a call computes
  size_t graphs = 0;   // most bytes for recorded steps and their contexts
};

// TensorRT wants memory at multiples of this.
constexpr size_t kAlignment = 256;

constexpr size_t aligned(size_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

// The backend, and what running the engine once has shown.
struct Running {
  std::unique_ptr<Backend> backend;
  size_t graphs = 0;      // bytes that recorded steps may come to take, as the first one took
  std::string no_graphs;  // why steps are not replayed as CUDA graphs; "" where they are
};

// Allocates the caches and runs the engine once.
//
// graphs: replay the steps of a static cache as CUDA graphs.
//
// Throws Error: there is too little memory, or the engine does not run.
Running make_backend(std::unique_ptr<cuda::Driver> driver, std::unique_ptr<Api> api,
                     std::unique_ptr<Engine> engine, const CacheForm& form, const Sizes& sizes,
                     bool graphs);

}  // namespace anybit::trt
