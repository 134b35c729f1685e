// The one way to start a kernel: cudaLaunchKernelEx under nvcc, the CPU simulation under g++.
#pragma once
#ifdef __CUDACC__
#include <cuda_runtime.h>

#include <atomic>
#else
#include "core/sim/simt.h"
#endif
#include "core/host/params.h"

namespace anybit {

struct LaunchShape {
  dim3 grid, block;
  size_t shared_bytes = 0;
  // may start before the launch before it has ended (programmatic
  // dependent launch, sm_90 and later)
  bool overlap = false;
};

#ifdef __CUDACC__

constexpr size_t kSharedWithoutOptIn = 48 << 10;  // bytes

// What the driver was asked and told about kernels of one signature, so that a launch need not wait
// for it every time. A slot holds a kernel, a device and the answer in one word; two kernels that
// meet in a slot only ask again.
class Asked {
 public:
  // The answer that is kept, below 256; -1 if there is none.
  int kept(const void* kernel, int device) {
    const uint64_t key = key_of(kernel, device), found = slot(key).load(std::memory_order_relaxed);
    return device < 256 && found >> 8 == key >> 8 ? int(found & 255) : -1;
  }

  // Takes the place of an earlier answer.
  void keep(const void* kernel, int device, int answer) {
    const uint64_t key = key_of(kernel, device);
    if (device < 256) slot(key).store(key | uint64_t(answer), std::memory_order_relaxed);
  }

 private:
  static uint64_t key_of(const void* kernel, int device) {  // addresses have 48 bits
    return reinterpret_cast<uint64_t>(kernel) << 16 | uint64_t(device & 255) << 8;
  }
  std::atomic<uint64_t>& slot(uint64_t key) { return slots_[(key * 0x9e3779b97f4a7c15u) >> 56]; }

  std::atomic<uint64_t> slots_[256] = {};
};

// Whether the kernel's code has the instructions of programmatic dependent launch: code for less
// than sm_90, which the driver may have translated for a later GPU, must not overlap.
template <class... Params>
bool waits_for_earlier_launch(void (*kernel)(Params...)) {
  static Asked asked;
  const void* const address = reinterpret_cast<const void*>(kernel);
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  if (const int kept = asked.kept(address, device); kept >= 0) return kept == 1;
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess) return false;
  const bool waits = attributes.ptxVersion >= 90;
  asked.keep(address, device, waits);
  return waits;
}

// Lets the kernel have so much shared memory, once for each device: the answer is KiB, of
// which a GPU has whole ones.
template <class... Params>
cudaError_t opt_in(void (*kernel)(Params...), size_t bytes, bool again = false) {
  static Asked asked;
  const void* const address = reinterpret_cast<const void*>(kernel);
  const int units = int((bytes + 1023) / 1024);
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  if (!again && asked.kept(address, device) == units) return cudaSuccess;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, units * 1024);
  if (error == cudaSuccess) asked.keep(address, device, units);
  return error;
}

template <class... Params, class... Args>
cudaError_t launch(const LaunchShape& shape, cudaStream_t stream, void (*kernel)(Params...),
                   Args&&... args) {
  if (shape.shared_bytes > kSharedWithoutOptIn) {
    if (const cudaError_t error = opt_in(kernel, shape.shared_bytes); error != cudaSuccess)
      return error;
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
  cudaError_t error = cudaLaunchKernelEx(&config, kernel, args...);
  // another context of the device than was asked
  if (error == cudaErrorInvalidValue && shape.shared_bytes > kSharedWithoutOptIn) {
    cudaGetLastError();
    error = opt_in(kernel, shape.shared_bytes, true);
    if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, args...);
  }
  return error;
}

#else

template <class... Params>
bool waits_for_earlier_launch(void (*)(Params...)) {
  return true;
}

inline unsigned sim_seed = 0;
inline thread_local std::string sim_error;

// Runs the kernel to its end before returning. A failure of the simulation becomes
// cudaErrorLaunchFailure (719) and a text.
template <class... Params, class... Args>
cudaError_t launch(const LaunchShape& shape, cudaStream_t, void (*kernel)(Params...),
                   Args... args) {
  if (!simt::launchable(shape.grid, shape.block, shape.shared_bytes))
    return cudaErrorInvalidConfiguration;
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
ANYBIT_API inline __attribute__((used)) void anybit_sim_set_seed(unsigned seed) {
  anybit::sim_seed = seed;
}
// Why the last call of this OS thread returned cudaErrorLaunchFailure; empty if none did.
ANYBIT_API inline __attribute__((used)) const char* anybit_sim_last_error() {
  return anybit::sim_error.c_str();
}
#endif
