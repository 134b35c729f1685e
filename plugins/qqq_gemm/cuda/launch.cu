// The host side of QQQGemm and its row of the table of ops: checks the shape, lays out the
// workspace and enqueues the kernels. Compiles with nvcc and with g++.
#include "core/device/norm.cuh"
#include "core/host/frame.h"
#include "qqq_gemm/cuda/config.h"
#include "qqq_gemm/cuda/families.h"
#include "qqq_gemm/cuda/kernel.cuh"
#include "qqq_gemm/rules.h"

namespace anybit {
namespace {

constexpr int kMaxGridY = 65535;

bool supported(const GemmShape& s) {
  if (s.m < 0 || s.n < 1 || s.k < 1 || s.n > INT32_MAX - 64 || s.k > INT32_MAX - 16) return false;
  if (s.group_size && s.k % s.group_size) return false;
  if (s.dtype < kFloat16 || s.dtype > kFloat32 || !norm_supported(s)) return false;
  return qqq_scheme_ok(s);
}

QqqArgs simple_args(const GemmShape& s) {
  QqqArgs p = {};
  p.m = s.m, p.n = s.n, p.k = s.k, p.group_size = s.group_size;
  p.k_pad = qqq_k_pad(s), p.n_pad = qqq_n_pad(s);
  return p;
}

size_t carve_simple(QqqArgs& p, const GemmShape& s, void* workspace) {
  Carver carver(workspace);
  p.normed = carve_normed(carver, s);
  p.token_scale = carver.take<float>(p.m);
  p.token_codes = carver.take<int8_t>(size_t(p.m) * p.k_pad);
  return carver.used();
}

template <class T>
cudaError_t run_simple(const QqqArgs& p, cudaStream_t stream) {
  const cudaError_t error =
      launch({dim3(p.m), dim3(kQuantizeThreads), kQuantizeShared}, stream, qqq_quantize<T>, p);
  if (error != cudaSuccess) return error;
  const dim3 outputs(ceil_div(p.n, kQqqThreads), p.m < kMaxGridY ? p.m : kMaxGridY);
  return launch({outputs, dim3(kQqqThreads)}, stream, qqq_gemm<T>, p);
}

PrepareShape prepare_shape(const GemmShape& s) {
  PrepareShape p = {};
  p.m = s.m, p.k = s.k, p.abits = s.abits, p.act_symmetric = s.act_symmetric, p.dtype = s.dtype;
  p.order = kNaturalCodes, p.epsilon = s.norm_epsilon;
  return p;
}

QqqGemmArgs fast_args(const GemmShape& s) {
  QqqGemmArgs p = {};
  p.m = s.m, p.n = s.n, p.columns_per_token = 1, p.dtype = s.dtype, p.group_size = s.group_size;
  p.chunks = qqq_chunks(s), p.packed_rows = qqq_k_pad(s) / 16, p.blocks = qqq_n_pad(s) / 64;
  return p;
}

// Lays out the workspace; with none only counts its bytes.
size_t carve_fast(QqqGemmArgs& p, const Plan& plan, const GemmShape& s, void* workspace) {
  Carver carver(workspace);
  carve_partials(carver, p, plan);
  carve_tokens(carver, p.tokens, prepare_shape(s), 0);
  return carver.used();
}

size_t workspace_of(int kernel, const GemmShape& s) {
  if (kernel == kSimple) {
    QqqArgs p = simple_args(s);
    return carve_simple(p, s, nullptr);
  }
  QqqGemmArgs p = fast_args(s);
  return carve_fast(p, qqq_plan(kernel, s, {}), s, nullptr);
}

const char* name_of(int kernel) { return kQqqKernels[kernel].name; }

cudaError_t simple(const GemmShape& s, const GemmBuffers& b, cudaStream_t stream) {
  QqqArgs p = simple_args(s);
  carve_simple(p, s, b.workspace);
  p.scale = b.scale, p.bias = b.bias, p.y = b.y;
  p.scale_group = static_cast<const __half*>(b.scale_group);
  p.weight = reinterpret_cast<const uint32_t*>(b.weight);
  const cudaError_t error = norm_input(s, b, p.normed, p.x, stream);
  if (error != cudaSuccess) return error;
  return with_dtype(s.dtype, [&](auto t) { return run_simple<decltype(t)>(p, stream); });
}

cudaError_t fast(Config config, const GemmShape& s, const GemmBuffers& b, const Device& device,
                 cudaStream_t stream) {
  const Plan plan = qqq_plan(config.kernel, s, device);
  QqqGemmArgs p = fast_args(s);
  carve_fast(p, plan, s, b.workspace);
  p.scale = b.scale, p.bias = b.bias, p.y = b.y;
  p.scale_group = static_cast<const uint16_t*>(b.scale_group);
  p.weight = reinterpret_cast<const uint32_t*>(b.weight);
  p.stages = ceil_div(p.chunks, plan.tile.chunks);
  PrepareShape prepare = prepare_shape(s);
  prepare.n_counters = config.shares > 1 ? int(plan.tiles(s)) : 0;
  const cudaError_t error = prepare_tokens(prepare, b.x, norm_of(s, b), p.tokens, false, stream);
  if (error != cudaSuccess) return error;
  const auto run =
      kQqqKernels[config.kernel].family == QqqFamily::kWarpgroup ? qqq_warpgroup : qqq_int8;
  return run(config.kernel, p, {config.shares, device, stream});
}

cudaError_t run(Config config, const GemmShape& s, const GemmBuffers& b, const Device& device,
                cudaStream_t stream) {
  return config.kernel == kSimple ? simple(s, b, stream) : fast(config, s, b, device, stream);
}

bool has_inputs(const GemmShape& shape, const GemmBuffers& buffers) {
  return buffers.weight && buffers.scale && (!shape.group_size || buffers.scale_group);
}

// clang-format off
constexpr KernelTable kTable = {"QQQGemm", kQqqKernelCount, name_of, supported, qqq_plan,
                                qqq_choose, workspace_of, has_inputs, run};
// clang-format on
const OpRegistration registration(op_from_table<kTable>());

}  // namespace
}  // namespace anybit
