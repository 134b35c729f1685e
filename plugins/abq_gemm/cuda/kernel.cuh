// ABQGemm kernels: y = x * w^T by counting bits, after "ABQ-LLM" (arXiv 2408.08554), with
// scales and zero points exact.
//
// A weight is w[n,k] = scale[n,g] * (q[n,k] - zero[n,g]), g = k / group_len, or where there is a
// minimum scale[n,g] * q[n,k] + minimum[n,g]. Its codes q lie in
// `planes` bit planes, the activation codes a (two's complement, abits planes) in the same layout,
// so that with plane weights +-2^i and 2^j
//   sum_k a*q = sum_i sum_j (+-2^i)(2^j) popcount(a_i AND q_j).
// Layout of a row (pictured for group_len 40): every group starts a new word, LSB
// first; pad bits (.) are 0.
//   word 0 = e 0..31 of group 0 | word 1 = e 32..39 of group 0 and 24 .
//   | word 2 = e 0..31 of group 1 | ... | pad to 4 words
#pragma once
#include "core/device/quantize.cuh"

namespace anybit {

constexpr int kMaxPlanes = 8;
constexpr int kAbqThreads = 64;  // outputs per block of a GEMM kernel

struct AbqArgs {
  int m, n, k;
  int n_groups, group_len;     // group_len = k when per channel
  int group_words, row_words;  // 32-bit words per group and per row of one plane
  int planes, abits;
  bool act_symmetric;
  const void* x;           // [m, k]
  const uint32_t* weight;  // [planes, n, row_words]
  const float* scale;      // [n, n_groups]
  const int32_t* zero;     // [n, n_groups] or null
  const float* minimum;    // [n, n_groups] where there is no zero, or null
  const float* bias;       // [n] or null
  void* y;                 // [m, n]
  float* token_scale;      // [m]                     workspace, written by abq_quantize
  int32_t* token_zero;     // [m]                     workspace
  uint32_t* token_planes;  // [abits, m, row_words]   workspace
  void* normed;            // [m, k]                  workspace: x after its norm, or null
};

// Quantises one token per block and writes its bit planes, a word per warp and step.
template <class T>
__global__ void abq_quantize(AbqArgs p) {
  const int m = blockIdx.x, lane = threadIdx.x % 32;
  const T* x = static_cast<const T*>(p.x) + size_t(m) * p.k;
  const TokenQuant quant = token_quant(row_range(x, p.k), p.abits, p.act_symmetric);
  if (threadIdx.x == 0) {
    p.token_scale[m] = quant.scale;
    p.token_zero[m] = quant.zero;
  }
  for (int word = threadIdx.x / 32; word < p.row_words; word += kQuantizeWarps) {
    const int group = word / p.group_words, e = word % p.group_words * 32 + lane;
    const bool inside = group < p.n_groups && e < p.group_len;
    const int code = inside ? quantized(float_from(x[group * p.group_len + e]), quant) : 0;
    for (int i = 0; i < p.abits; ++i) {
      const uint32_t bits = ballot(code >> i & 1);
      if (lane == 0) p.token_planes[(size_t(i) * p.m + m) * p.row_words + word] = bits;
    }
  }
}

struct GroupSums {
  int32_t aq;  // sum of a * q over a group
  int32_t a;   // sum of a
  int32_t q;   // sum of q
};

// Sums over words [first, first + group_words) of activation row m and weight row n.
__device__ inline GroupSums group_sums(const AbqArgs& p, int m, int n, int first) {
  const size_t a_plane = size_t(p.m) * p.row_words, q_plane = size_t(p.n) * p.row_words;
  const uint32_t* a_rd = p.token_planes + size_t(m) * p.row_words + first;
  const uint32_t* q_rd = p.weight + size_t(n) * p.row_words + first;
  GroupSums sums{0, 0, 0};
  for (int word = 0; word < p.group_words; ++word) {
    uint32_t q[kMaxPlanes];
    ANYBIT_UNROLL
    for (int j = 0; j < kMaxPlanes; ++j) {  // a fixed bound keeps q in registers
      q[j] = j < p.planes ? q_rd[j * q_plane + word] : 0;
      sums.q += __popc(q[j]) << j;
    }
    for (int i = 0; i < p.abits; ++i) {
      const uint32_t a = a_rd[i * a_plane + word];
      int32_t dot = 0;
      ANYBIT_UNROLL
      for (int j = 0; j < kMaxPlanes; ++j)
        if (j < p.planes) dot += __popc(a & q[j]) << j;
      // two's complement: the top plane counts negative
      const int32_t weight = i == p.abits - 1 ? -(1 << i) : 1 << i;
      sums.aq += weight * dot;
      sums.a += weight * __popc(a);
    }
  }
  return sums;
}

template <class T>
__device__ void store_output(const AbqArgs& p, int m, int n, float v) {
  if (p.bias) v = __fadd_rn(v, p.bias[n]);
  store_saturated(static_cast<T*>(p.y) + size_t(m) * p.n + n, v);
}

// One output per thread: grid (ceil(n / kAbqThreads), any).
template <class T>
__global__ void abq_gemm(AbqArgs p) {
  const int n = blockIdx.x * blockDim.x + threadIdx.x;
  if (n >= p.n) return;
  for (int m = blockIdx.y; m < p.m; m += gridDim.y) {
    const int64_t a_zero = p.token_zero[m];
    float acc = 0.0f;
    for (int g = 0; g < p.n_groups; ++g) {
      const GroupSums s = group_sums(p, m, n, g * p.group_words);
      const size_t at = size_t(n) * p.n_groups + g;
      const int64_t q_zero = p.zero ? p.zero[at] : 0;
      const int64_t a_sum = s.a - p.group_len * a_zero;
      // sum (a - a_zero)(q - q_zero), exact
      const int64_t d = s.aq - a_zero * s.q - q_zero * a_sum;
      float term = __fmul_rn(__ll2float_rn(d), p.scale[at]);
      if (p.minimum) term = __fadd_rn(term, __fmul_rn(__ll2float_rn(a_sum), p.minimum[at]));
      acc = __fadd_rn(acc, term);
    }
    store_output<T>(p, m, n, __fmul_rn(acc, p.token_scale[m]));
  }
}

// The same with activations left in floating point ("A16").
template <class T>
__global__ void abq_gemm_float(AbqArgs p) {
  const int n = blockIdx.x * blockDim.x + threadIdx.x;
  if (n >= p.n) return;
  const size_t q_plane = size_t(p.n) * p.row_words;
  for (int m = blockIdx.y; m < p.m; m += gridDim.y) {
    const T* x = static_cast<const T*>(p.x) + size_t(m) * p.k;
    float acc = 0.0f;
    for (int g = 0; g < p.n_groups; ++g) {
      const size_t at = size_t(n) * p.n_groups + g;
      const int64_t zero = p.zero ? p.zero[at] : 0;
      const uint32_t* q_rd = p.weight + size_t(n) * p.row_words + g * p.group_words;
      float sum = 0.0f, x_sum = 0.0f;
      for (int e = 0; e < p.group_len; ++e) {
        int q = 0;
        for (int j = 0; j < p.planes; ++j) q |= int(q_rd[j * q_plane + e / 32] >> e % 32 & 1) << j;
        const float v = float_from(x[g * p.group_len + e]);
        sum += v * __ll2float_rn(q - zero);
        x_sum += v;
      }
      acc += sum * p.scale[at];
      if (p.minimum) acc += x_sum * p.minimum[at];
    }
    store_output<T>(p, m, n, acc);
  }
}

}  // namespace anybit
