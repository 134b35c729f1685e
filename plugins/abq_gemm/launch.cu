// ABQGemm entry points: checks the shape, lays out the workspace and enqueues the kernels. Compiles with nvcc and with g++.
#include "abq_gemm/kernel.cuh"
#include "core/launch.h"

namespace anybit {
namespace {

constexpr int kMaxGridY = 65535;

bool levels_ok(const GemmShape& s) {
  const bool balanced = (s.wbits == 2 && s.levels == 5) || (s.wbits == 1 && s.levels == 3);
  if (s.wbits < 1 || s.wbits > 8 || !(s.levels == 1 << s.wbits || balanced)) return false;
  return (s.levels - 1) >> (s.planes - 1) == 1;  // just enough planes for the largest code
}

bool supported(const GemmShape& s) {
  if (s.m < 0 || s.n < 1 || s.k < 1 || s.group_size < 0 || s.group_size > s.k) return false;
  if (s.group_size && s.k % s.group_size) return false;
  if (s.planes < 1 || s.planes > kMaxPlanes || !levels_ok(s)) return false;
  if (s.dtype < kFloat16 || s.dtype > kFloat32) return false;
  if (s.abits == 16) return true;
  const int64_t group_len = s.group_size ? s.group_size : s.k;  // int32 sums must not overflow
  return s.abits >= 2 && s.abits <= 8 && 128 * (s.levels - 1) * group_len < int64_t(1) << 31;
}

AbqArgs args_from(const GemmShape& s) {
  AbqArgs p = {};
  p.m = s.m, p.n = s.n, p.k = s.k;
  p.group_len = s.group_size ? s.group_size : s.k;
  p.n_groups = s.k / p.group_len;
  p.group_words = ceil_div(p.group_len, 32);
  p.row_words = round_up(p.n_groups * p.group_words, 4);
  p.planes = s.planes, p.abits = s.abits, p.act_symmetric = s.act_symmetric != 0;
  return p;
}

size_t planes_offset(const AbqArgs& p) { return round_up(size_t(p.m) * (sizeof(float) + sizeof(int32_t)), size_t(16)); }

template <class T>
cudaError_t run(const AbqArgs& p, cudaStream_t stream) {
  const dim3 outputs(ceil_div(p.n, kAbqThreads), p.m < kMaxGridY ? p.m : kMaxGridY);
  if (p.abits == 16) return launch({outputs, dim3(kAbqThreads)}, stream, abq_gemm_float<T>, p);
  const cudaError_t error = launch({dim3(p.m), dim3(kQuantizeThreads), kQuantizeShared}, stream, abq_quantize<T>, p);
  return error != cudaSuccess ? error : launch({outputs, dim3(kAbqThreads)}, stream, abq_gemm<T>, p);
}

}  // namespace
}  // namespace anybit

size_t anybit_abq_gemm_workspace(const GemmShape* shape) {
  if (!anybit::supported(*shape) || shape->abits == 16) return 0;
  const anybit::AbqArgs p = anybit::args_from(*shape);
  return anybit::planes_offset(p) + size_t(p.abits) * p.m * p.row_words * sizeof(uint32_t);
}

int anybit_abq_gemm(const GemmShape* shape, const GemmBuffers* b, void* cuda_stream) {
  using namespace anybit;
  if (!supported(*shape)) return cudaErrorInvalidValue;
  if (shape->m == 0) return cudaSuccess;
  if (!b->x || !b->weight || !b->scale || !b->zero || !b->y) return cudaErrorInvalidValue;
  if (anybit_abq_gemm_workspace(shape) && !b->workspace) return cudaErrorInvalidValue;
  AbqArgs p = args_from(*shape);
  p.x = b->x, p.scale = b->scale, p.zero = b->zero, p.bias = b->bias, p.y = b->y;
  p.weight = reinterpret_cast<const uint32_t*>(b->weight);
  p.token_scale = static_cast<float*>(b->workspace);
  p.token_zero = reinterpret_cast<int32_t*>(p.token_scale + p.m);
  p.token_planes = reinterpret_cast<uint32_t*>(static_cast<char*>(b->workspace) + planes_offset(p));
  return with_dtype(shape->dtype, [&](auto t) { return run<decltype(t)>(p, static_cast<cudaStream_t>(cuda_stream)); });
}
