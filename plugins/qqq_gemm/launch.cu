// QQQGemm entry points: checks the shape, lays out the workspace and enqueues the kernels. Compiles with nvcc and with g++.
#include "core/launch.h"
#include "qqq_gemm/kernel.cuh"

namespace anybit {
namespace {

constexpr int kMaxGridY = 65535;

bool supported(const GemmShape& s) {
  if (s.m < 0 || s.n < 1 || s.k < 1 || s.n > INT32_MAX - 64 || s.k > INT32_MAX - 16) return false;
  if (s.group_size != 0 && s.group_size != 64 && s.group_size != 128) return false;
  if (s.group_size && s.k % s.group_size) return false;
  if (s.wbits != 4 || s.levels != 16 || s.abits != 8 || s.act_symmetric != 1) return false;
  if (s.dtype < kFloat16 || s.dtype > kFloat32) return false;
  return 127 * 127 * int64_t(s.k) < int64_t(1) << 31;  // int32 sums must not overflow
}

QqqArgs args_from(const GemmShape& s) {
  QqqArgs p = {};
  p.m = s.m, p.n = s.n, p.k = s.k, p.group_size = s.group_size;
  p.k_pad = round_up(s.k, 16), p.n_pad = round_up(s.n, 64);
  return p;
}

size_t codes_offset(const QqqArgs& p) { return round_up(size_t(p.m) * sizeof(float), size_t(16)); }

template <class T>
cudaError_t run(const QqqArgs& p, cudaStream_t stream) {
  const cudaError_t error = launch({dim3(p.m), dim3(kQuantizeThreads), kQuantizeShared}, stream, qqq_quantize<T>, p);
  if (error != cudaSuccess) return error;
  const dim3 outputs(ceil_div(p.n, kQqqThreads), p.m < kMaxGridY ? p.m : kMaxGridY);
  return launch({outputs, dim3(kQqqThreads)}, stream, qqq_gemm<T>, p);
}

}  // namespace
}  // namespace anybit

size_t anybit_qqq_gemm_workspace(const GemmShape* shape) {
  if (!anybit::supported(*shape)) return 0;
  const anybit::QqqArgs p = anybit::args_from(*shape);
  return anybit::codes_offset(p) + size_t(p.m) * p.k_pad;
}

int anybit_qqq_gemm(const GemmShape* shape, const GemmBuffers* b, void* cuda_stream) {
  using namespace anybit;
  if (!supported(*shape)) return cudaErrorInvalidValue;
  if (shape->m == 0) return cudaSuccess;
  if (!b->x || !b->weight || !b->scale || !b->y || !b->workspace) return cudaErrorInvalidValue;
  if (shape->group_size && !b->scale_group) return cudaErrorInvalidValue;
  QqqArgs p = args_from(*shape);
  p.x = b->x, p.scale = b->scale, p.bias = b->bias, p.y = b->y;
  p.scale_group = static_cast<const __half*>(b->scale_group);
  p.weight = reinterpret_cast<const uint32_t*>(b->weight);
  p.token_scale = static_cast<float*>(b->workspace);
  p.token_codes = static_cast<int8_t*>(b->workspace) + codes_offset(p);
  return with_dtype(shape->dtype, [&](auto t) { return run<decltype(t)>(p, static_cast<cudaStream_t>(cuda_stream)); });
}
