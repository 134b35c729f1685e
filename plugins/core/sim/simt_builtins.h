// CUDA's built-in variables and the intrinsics that our kernels use, on the simulation of simt.h,
// with the results of the hardware.
#pragma once
#include "core/sim/simt.h"

#define threadIdx (simt::me->tid)
#define blockIdx (simt::me->block->idx)
#define blockDim (simt::block_dim)
#define gridDim (simt::grid_dim)
#define __syncthreads simt::sync_block
#define __syncwarp simt::sync_warp
inline void __threadfence() {}
template <class T>
T __ldcg(const T* from) {
  return *from;
}
// threads take turns: every step is atomic
inline int atomicAdd(int* to, int v) { return std::exchange(*to, *to + v); }
inline int __popc(uint32_t v) { return __builtin_popcount(v); }
inline float __uint_as_float(uint32_t v) {
  float as_float;
  std::memcpy(&as_float, &v, 4);
  return as_float;
}
inline uint32_t __float_as_uint(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}
// Byte i of the result is the byte of {b, a} that nibble i of `selector`
// (0..7) names. PTX prmt.b32.
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i)
    result |= uint32_t(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return result;
}
// sum + the dot product of the four signed bytes of a and b. PTX dp4a.s32.s32.
inline int __dp4a(int a, int b, int sum) {
  for (int i = 0; i < 32; i += 8) sum += int8_t(uint32_t(a) >> i) * int8_t(uint32_t(b) >> i);
  return sum;
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned sum) {  // the same of unsigned bytes
  for (int i = 0; i < 32; i += 8) sum += (a >> i & 255) * (b >> i & 255);
  return sum;
}
inline float __fmul_rn(float a, float b) { return a * b; }  // compile with -ffp-contract=off
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __ll2float_rn(long long v) { return static_cast<float>(v); }
inline float __int2float_rn(int v) { return static_cast<float>(v); }
