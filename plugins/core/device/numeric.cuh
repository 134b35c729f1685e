// Element types of x and y: loads to fp32, saturating stores, and float-to-integer
// rounding without undefined cases.
#pragma once
#include "core/device/ptx.cuh"
#include "core/host/config.h"
#include "core/host/params.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace anybit {

__device__ inline float float_from(float v) { return v; }
__device__ inline float float_from(__half v) { return __half2float(v); }
__device__ inline float float_from(__nv_bfloat16 v) { return __bfloat162float(v); }

// v limited to [-limit, limit]; NaN stays NaN, infinities become +-limit.
__device__ inline float limited(float v, float limit) {
  return v > limit ? limit : v < -limit ? -limit : v;
}

// Saturating casts: an output too large for fp16 (65504) or bf16 becomes the largest
// finite number, never infinity.
__device__ inline void store_saturated(float* to, float v) { *to = v; }
__device__ inline void store_saturated(__half* to, float v) {
  *to = __float2half_rn(limited(v, 65504.0f));
}
__device__ inline void store_saturated(__nv_bfloat16* to, float v) {
  *to = __float2bfloat16_rn(limited(v, 3.38953139e38f));
}

// rint(v) + offset limited to [lo, hi], rounding half to even; 0 for NaN. The limit comes
// before the conversion to int.
__device__ inline int rounded(float v, float offset, int lo, int hi) {
  const float shifted = __fadd_rn(rintf(v), offset);
  if (shifted != shifted) return 0;
  return static_cast<int>(shifted < lo ? float(lo) : shifted > hi ? float(hi) : shifted);
}

// Calls f with a value of the C++ type that `dtype` names, e.g.
//   [&](auto t) { return run<decltype(t)>(); }
template <class F>
auto with_dtype(int32_t dtype, F&& f) {
  if (dtype == kFloat16) return f(__half{});
  if (dtype == kBFloat16) return f(__nv_bfloat16{});
  return f(float{});
}

}  // namespace anybit
