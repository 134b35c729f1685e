// Per-token activation quantisation inside one thread block; the same arithmetic as
// plugins/core/activation.py.
//
// x ~ scale * (code - zero), codes signed. Every fp32 operation is rounded on its own (no fma), so
// that numpy, ONNX Runtime and the GPU agree to the last bit.
#pragma once
#include "core/device/numeric.cuh"

namespace anybit {

// threads of a block that quantises one token
constexpr int kQuantizeThreads = 128;
constexpr int kQuantizeWarps = kQuantizeThreads / 32;
// bytes of shared memory for row_range
constexpr size_t kQuantizeShared = 2 * kQuantizeWarps * sizeof(float);
// Smallest range, so that an all-zero token has a scale. 2^-118, because then scale >= 2^-118 / 255
// is a normal number, which nothing flushes to zero, and 1 / scale is finite: with an infinite one,
// 0 * inf would turn zeros into NaN.
constexpr float kTiny = 0x1p-118f;

struct RowRange {
  float lo, hi;  // min(x, 0) and max(x, 0) over the row; both NaN if any x is NaN
};

struct TokenQuant {
  // NaN if the row holds a NaN or an infinity, so that the whole output row shows it
  float scale;
  float inverse;  // 1 / scale
  int zero;
  int lo, hi;  // code limits
};

// Range of one row x [k], found by all threads of the block together and returned to all of them.
template <class T>
__device__ RowRange row_range(const T* x, int k) {
  RowRange r{0.0f, 0.0f};
  for (int i = threadIdx.x; i < k; i += blockDim.x) {
    const float v = float_from(x[i]);
    r = {min_nan(r.lo, v), max_nan(r.hi, v)};
  }
  for (int lane_mask = 16; lane_mask > 0; lane_mask /= 2)
    r = {min_nan(r.lo, shuffle_xor(r.lo, lane_mask)), max_nan(r.hi, shuffle_xor(r.hi, lane_mask))};
  RowRange* warps_sh = dynamic_shared<RowRange>();  // [kQuantizeWarps]
  if (threadIdx.x % 32 == 0) warps_sh[threadIdx.x / 32] = r;
  __syncthreads();
  for (int w = 0; w < kQuantizeWarps; ++w)
    r = {min_nan(r.lo, warps_sh[w].lo), max_nan(r.hi, warps_sh[w].hi)};
  return r;
}

// Scale and zero point for `bits` (2..8) bit codes of a row with range r.
__device__ inline TokenQuant token_quant(RowRange r, int bits, bool symmetric) {
  TokenQuant q;
  q.hi = (1 << (bits - 1)) - 1;
  q.lo = symmetric ? -q.hi : -q.hi - 1;
  const float range = symmetric ? max_nan(-r.lo, r.hi) : __fsub_rn(r.hi, r.lo);
  const float steps = __int2float_rn(symmetric ? q.hi : (1 << bits) - 1);
  // range - range is 0 for a finite range and NaN otherwise.
  q.scale = __fadd_rn(__fdiv_rn(max_nan(range, kTiny), steps), __fsub_rn(range, range));
  q.inverse = __fdiv_rn(1.0f, q.scale);
  q.zero = symmetric ? 0 : rounded(__fmul_rn(-r.lo, q.inverse), float(q.lo), q.lo, q.hi);
  return q;
}

// Code of one element; 0 where the scale is NaN.
__device__ inline int quantized(float v, const TokenQuant& q) {
  return rounded(__fmul_rn(v, q.inverse), float(q.zero), q.lo, q.hi);
}

}  // namespace anybit
