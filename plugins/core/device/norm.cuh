// RMSNorm of a GEMM node's input: for the simple kernels a kernel of its own in fp64, which the
// fast ones' fused norm is held against.
#pragma once
#include <cfloat>
#include <cmath>

#include "core/device/numeric.cuh"
#include "core/device/words.cuh"
#include "core/host/frame.h"

namespace anybit {

constexpr int kNormThreads = 128;

struct NormArgs {
  int k;
  double epsilon;
  const void* x;      // [m, k]
  const void* gamma;  // [k]
  void* y;            // [m, k]
};

// y = RMSNorm(x) * gamma of one token per block: rms_norm() of
// plugins/core/activation.py, to the bit but for ties.
template <class T>
__global__ void rms_norm(NormArgs p) {
  const size_t first = size_t(blockIdx.x) * p.k;
  const T *x = static_cast<const T*>(p.x) + first, *gamma = static_cast<const T*>(p.gamma);
  const auto wide = [](T v) { return double(float_from(v)); };
  double squares = 0;
  for (int i = threadIdx.x; i < p.k; i += kNormThreads) squares += wide(x[i]) * wide(x[i]);
  double* squares_sh = dynamic_shared<double>();  // [kNormThreads]
  squares_sh[threadIdx.x] = squares;
  __syncthreads();
  squares = 0;
  for (int thread = 0; thread < kNormThreads; ++thread) squares += squares_sh[thread];
  const double inverse_rms = 1 / sqrt(squares / p.k + p.epsilon);
  for (int i = threadIdx.x; i < p.k; i += kNormThreads)
    static_cast<T*>(p.y)[first + i] =
        rounded_to<T>(float(wide(x[i]) * inverse_rms * wide(gamma[i])));
}

inline bool norm_supported(const GemmShape& s) {
  return s.norm_epsilon >= 0 && s.norm_epsilon <= FLT_MAX;
}

// What the token kernels fuse.
inline NormBuffers norm_of(const GemmShape& s, const GemmBuffers& b) {
  return {has_norm(s) ? b.gamma : nullptr, nullptr, nullptr};
}

// Room for x [m, k] after its norm; null without one.
inline void* carve_normed(Carver& carver, const GemmShape& s) {
  return has_norm(s) ? carver.take<char>(size_t(s.m) * s.k * (s.dtype == kFloat32 ? 4 : 2))
                     : nullptr;
}

// Sets x to what a simple kernel reads: the caller's, or after the norm that this enqueues.
inline cudaError_t norm_input(const GemmShape& s, const GemmBuffers& b, void* normed,
                              const void*& x, cudaStream_t stream) {
  x = has_norm(s) ? normed : b.x;
  if (!has_norm(s)) return cudaSuccess;
  const NormArgs p = {s.k, s.norm_epsilon, b.x, b.gamma, normed};
  const LaunchShape shape{dim3(s.m), dim3(kNormThreads), kNormThreads * sizeof(double)};
  return with_dtype(s.dtype,
                    [&](auto t) { return launch(shape, stream, rms_norm<decltype(t)>, p); });
}

}  // namespace anybit
