// The machine-level steps of the kernels, each with a device body and a host (simt) body; inline PTX belongs here only.
#pragma once
#include <cstdint>
#include <cstring>
#ifdef __CUDACC__
#define ANYBIT_UNROLL _Pragma("unroll")
#else
#include "core/simt.h"
#define ANYBIT_UNROLL
#endif

namespace anybit {

constexpr uint32_t kFullWarp = 0xffffffffu;

// The block's dynamic shared memory, 16-byte aligned; its size is set at launch.
template <class T>
__device__ inline T* dynamic_shared() {
#ifdef __CUDACC__
  extern __shared__ __align__(16) unsigned char raw_shared[];
  return reinterpret_cast<T*>(raw_shared);
#else
  return static_cast<T*>(simt::shared_memory());
#endif
}

// `value` of lane (own lane ^ lane_mask). All 32 lanes must call it. PTX shfl.sync.bfly.b32.
__device__ inline float shuffle_xor(float value, int lane_mask) {
#ifdef __CUDACC__
  return __shfl_xor_sync(kFullWarp, value, lane_mask);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = simt::exchange(bits)[simt::me->lane ^ lane_mask];
  std::memcpy(&value, &bits, 4);
  return value;
#endif
}

// Bit i = predicate of lane i. All 32 lanes must call it. PTX vote.sync.ballot.b32.
__device__ inline uint32_t ballot(bool predicate) {
#ifdef __CUDACC__
  return __ballot_sync(kFullWarp, predicate);
#else
  const uint32_t* lanes = simt::exchange(predicate);
  uint32_t word = 0;
  for (int i = 0; i < 32; ++i) word |= lanes[i] << i;
  return word;
#endif
}

}  // namespace anybit
