// The one way to start a kernel: cudaLaunchKernelEx under nvcc, the CPU simulation under g++.
#pragma once
#ifdef __CUDACC__
#include <cuda_runtime.h>

#include <utility>
#else
#include "core/simt.h"
#endif
#include "core/params.h"

namespace anybit {

struct LaunchShape {
  dim3 grid, block;
  size_t shared_bytes = 0;
  bool overlap = false;  // may start before the launch before it has ended (programmatic dependent launch, sm_90 and later)
};

#ifdef __CUDACC__

// Whether the kernel's code has the instructions of programmatic dependent launch: code for less than sm_90, which the driver may
// have translated for a later GPU, must not overlap.
template <class... Params>
bool waits_for_earlier_launch(void (*kernel)(Params...)) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90;
}

constexpr size_t kSharedWithoutOptIn = 48 << 10;  // bytes

template <class... Params, class... Args>
cudaError_t launch(const LaunchShape& shape, cudaStream_t stream, void (*kernel)(Params...), Args&&... args) {
  if (shape.shared_bytes > kSharedWithoutOptIn) {
    const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
    const cudaError_t error = cudaFuncSetAttribute(kernel, attribute, static_cast<int>(shape.shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.attrs = &overlap;
  config.numAttrs = shape.overlap ? 1 : 0;
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
}

#else

template <class... Params>
bool waits_for_earlier_launch(void (*)(Params...)) {
  return true;
}

inline unsigned sim_seed = 0;
inline thread_local std::string sim_error;

// Runs the kernel to its end before returning. A failure of the simulation becomes cudaErrorLaunchFailure (719) and a text.
template <class... Params, class... Args>
cudaError_t launch(const LaunchShape& shape, cudaStream_t, void (*kernel)(Params...), Args... args) {
  if (!simt::launchable(shape.grid, shape.block, shape.shared_bytes)) return cudaErrorInvalidConfiguration;
  try {
    simt::launch(shape.grid, shape.block, shape.shared_bytes, sim_seed, [=] { kernel(args...); });
    return cudaSuccess;
  } catch (const std::exception& error) {
    sim_error = error.what();
    return cudaErrorLaunchFailure;
  }
}

#endif

}  // namespace anybit

#ifndef __CUDACC__
// The simulation library's own controls, inline so that every op's launch.cu may carry them.
ANYBIT_API inline __attribute__((used)) void anybit_sim_set_seed(unsigned seed) { anybit::sim_seed = seed; }
// Why the last call of this OS thread returned cudaErrorLaunchFailure; empty if none did.
ANYBIT_API inline __attribute__((used)) const char* anybit_sim_last_error() { return anybit::sim_error.c_str(); }
#endif
