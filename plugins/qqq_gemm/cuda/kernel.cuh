// QQQGemm kernels: W4A8 integer GEMM on the packed layout of "QQQ" (arXiv 2406.09904), without
// its locks and reduce buffer.
//
// Per channel: w8 = q, a code -8..7. Per group: w8 = clamp(rint(q * scale_group),
// -127, 127), an int8 weight.
//   y[m,n] = (float(sum_k a[m,k] * w8[n,k]) * scale[n]) * token_scale[m]
// Weight words, [k_pad / 16, 2 * n_pad], k_pad = k rounded up to 16, n_pad = n to 64. In row k/16,
// a 64-column block is 128 words = 32 lanes of 4 words, the int8 B fragments that lane of
// mma.m16n8k16 needs for columns 16j + 8b + lane/4:
//   word = 128 * (n/64) + 4 * lane + j,  lane = 4 * (n%8) + (k%16)/4,  j = (n%64)/16,
//   b = (n%16)/8,  r = k%4
//   nibble   per channel  r: 0 1 2 3     per group  r: 0 1 2 3
//            b=0             1 3 5 7                   0 4 1 5
//            b=1             0 2 4 6                   2 6 3 7
#pragma once
#include "core/device/quantize.cuh"

namespace anybit {

constexpr int kQqqThreads = 64;  // outputs per block of the GEMM kernel

// The packed weight as the fast kernels take it.
constexpr int kPackedRowK = 16;                              // k of a packed row
constexpr int kChunkK = 128;                                 // k of a chunk
constexpr int kChunkRows = kChunkK / kPackedRowK;            // packed rows of a chunk
constexpr int kBlockRows = 64;                               // weight rows of a column block
constexpr int kBlockWords = 2 * kBlockRows;                  // of a packed row
constexpr int kBlockBytes = kBlockWords * sizeof(uint32_t);  // of a packed row
constexpr int kLaneWords = kBlockWords / 32;  // one for each m16 tile of the column block

struct QqqArgs {
  int m, n, k;
  int group_size;  // 0 = per channel
  int k_pad, n_pad;
  const void* x;              // [m, k]
  const uint32_t* weight;     // [k_pad / 16, 2 * n_pad]
  const float* scale;         // [n]
  const __half* scale_group;  // [k / group_size, n] or null
  const float* bias;          // [n] or null
  void* y;                    // [m, n]
  float* token_scale;         // [m]          workspace, written by qqq_quantize
  int8_t* token_codes;        // [m, k_pad]   workspace, pad codes 0
  void* normed;               // [m, k]       workspace: x after its norm; null without one
};

// Quantises one token per block, symmetric to 8 bits.
template <class T>
__global__ void qqq_quantize(QqqArgs p) {
  const int m = blockIdx.x;
  const T* x = static_cast<const T*>(p.x) + size_t(m) * p.k;
  const TokenQuant quant = token_quant(row_range(x, p.k), 8, true);
  if (threadIdx.x == 0) p.token_scale[m] = quant.scale;
  for (int k = threadIdx.x; k < p.k_pad; k += kQuantizeThreads)
    p.token_codes[size_t(m) * p.k_pad + k] = k < p.k ? quantized(float_from(x[k]), quant) : 0;
}

// Weight (k = 4 * quad + r, n) from its word: the 4-bit code, and per group its int8 value.
__device__ inline int int8_weight(const QqqArgs& p, uint32_t word, int n, int quad, int r) {
  const int b = n % 16 / 8;
  if (!p.group_size) {
    const uint32_t nibble = word >> 4 * (2 * r + 1 - b) & 15;
    return nibble < 8 ? int(nibble) : int(nibble) - 16;
  }
  const int code = int(word >> 4 * (2 * b + 4 * (r % 2) + r / 2) & 15) - 8;
  const float scale = __half2float(p.scale_group[size_t(4 * quad / p.group_size) * p.n + n]);
  return rounded(__fmul_rn(__int2float_rn(code), scale), 0.0f, -127, 127);
}

// One output per thread: grid (ceil(n / kQqqThreads), any).
template <class T>
__global__ void qqq_gemm(QqqArgs p) {
  const int n = blockIdx.x * blockDim.x + threadIdx.x;
  if (n >= p.n) return;
  const uint32_t* weight_rd = p.weight + 128 * size_t(n / 64) + 16 * (n % 8) + n % 64 / 16;
  for (int m = blockIdx.y; m < p.m; m += gridDim.y) {
    const int8_t* codes_rd = p.token_codes + size_t(m) * p.k_pad;
    int32_t sum = 0;
    for (int quad = 0; quad < (p.k + 3) / 4; ++quad) {  // 4 consecutive k share a word
      const uint32_t word = weight_rd[size_t(quad / 4) * 2 * p.n_pad + 4 * (quad % 4)];
      for (int r = 0; r < 4; ++r) sum += codes_rd[4 * quad + r] * int8_weight(p, word, n, quad, r);
    }
    float v = __fmul_rn(__fmul_rn(__int2float_rn(sum), p.scale[n]), p.token_scale[m]);
    if (p.bias) v = __fadd_rn(v, p.bias[n]);
    store_saturated(static_cast<T*>(p.y) + size_t(m) * p.n + n, v);
  }
}

}  // namespace anybit
