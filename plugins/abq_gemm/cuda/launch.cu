// The host side of ABQGemm and its row of the table of ops: checks the shape, lays out the
// workspace and enqueues the kernels. Compiles with nvcc and with g++.
#include "abq_gemm/cuda/config.h"
#include "abq_gemm/cuda/families.h"
#include "abq_gemm/cuda/kernel.cuh"
#include "abq_gemm/rules.h"
#include "core/device/norm.cuh"
#include "core/host/frame.h"

namespace anybit {
namespace {

constexpr int kMaxGridY = 65535;

bool supported(const GemmShape& s) {
  if (s.m < 0 || s.n < 1 || s.k < 1 || s.group_size < 0 || s.group_size > s.k) return false;
  if (s.group_size && s.k % s.group_size) return false;
  if (s.dtype < kFloat16 || s.dtype > kFloat32 || !norm_supported(s)) return false;
  return abq_scheme_ok(s);
}

AbqArgs simple_args(const GemmShape& s) {
  AbqArgs p = {};
  p.m = s.m, p.n = s.n, p.k = s.k;
  p.group_len = abq_group_len(s);
  p.n_groups = abq_n_groups(s);
  p.group_words = abq_group_words(s);
  p.row_words = abq_row_words(s);
  p.planes = s.planes, p.abits = s.abits, p.act_symmetric = s.act_symmetric != 0;
  return p;
}

size_t carve_simple(AbqArgs& p, const GemmShape& s, void* workspace) {
  Carver carver(workspace);
  p.normed = carve_normed(carver, s);
  if (p.abits == kAbqWeightOnly) return carver.used();
  p.token_scale = carver.take<float>(p.m);
  p.token_zero = carver.take<int32_t>(p.m);
  p.token_planes = carver.take<uint32_t>(size_t(p.abits) * p.m * p.row_words);
  return carver.used();
}

template <class T>
cudaError_t run_simple(const AbqArgs& p, cudaStream_t stream) {
  const dim3 outputs(ceil_div(p.n, kAbqThreads), p.m < kMaxGridY ? p.m : kMaxGridY);
  if (p.abits == kAbqWeightOnly)
    return launch({outputs, dim3(kAbqThreads)}, stream, abq_gemm_float<T>, p);
  const cudaError_t error =
      launch({dim3(p.m), dim3(kQuantizeThreads), kQuantizeShared}, stream, abq_quantize<T>, p);
  return error != cudaSuccess ? error
                              : launch({outputs, dim3(kAbqThreads)}, stream, abq_gemm<T>, p);
}

AbqGemmArgs fast_args(const GemmShape& s) {
  AbqGemmArgs p = {};
  p.m = s.m, p.n = s.n, p.dtype = s.dtype;
  p.group_len = abq_group_len(s);
  p.n_groups = abq_n_groups(s);
  p.group_words = abq_group_words(s);
  p.row_words = abq_row_words(s);
  p.planes = s.planes, p.abits = s.abits, p.asymmetric = s.act_symmetric == 0;
  // |P| and |z Q| stay below 128 (levels - 1) L, |zero A| and |z L zero| below 128 L |zero|
  const int64_t limit = ((int64_t{1} << 31) - 1) / (int64_t{256} * p.group_len) - (s.levels - 1);
  p.zero_limit = limit < 0 ? -1 : int32_t(limit);
  return p;
}

PrepareShape prepare_shape(AbqFamily family, const GemmShape& s) {
  PrepareShape p = {};
  p.m = s.m, p.k = s.k, p.group_size = s.group_size, p.abits = s.abits,
  p.act_symmetric = s.act_symmetric, p.dtype = s.dtype;
  p.epsilon = s.norm_epsilon;
  p.order = family == AbqFamily::kWeightOnly ? kSlotFloats
            : family == AbqFamily::kBinary   ? kBitPlanes
                                             : kSlotCodes;
  p.unit_words = abq_form(family, s).words;
  return p;
}

// Lays out the workspace; with none only counts its bytes.
size_t carve_fast(AbqGemmArgs& p, int kernel, const GemmShape& s, void* workspace) {
  Carver carver(workspace);
  carve_partials(carver, p, abq_plan(kernel, s, {}));
  carve_tokens(carver, p.tokens, prepare_shape(kAbqKernels[kernel].family, s),
               s.abits == kAbqWeightOnly ? 0 : p.n_groups);
  return carver.used();
}

size_t workspace_of(int kernel, const GemmShape& s) {
  if ((kAbqKernels[kernel].family == AbqFamily::kWeightOnly) != (s.abits == kAbqWeightOnly) &&
      kernel != kSimple)
    return 0;
  if (kernel == kSimple) {
    AbqArgs p = simple_args(s);
    return carve_simple(p, s, nullptr);
  }
  AbqGemmArgs p = fast_args(s);
  return carve_fast(p, kernel, s, nullptr);
}

template <class Args>
void set_weights(Args& p, const GemmShape& s, const GemmBuffers& b) {
  p.weight = reinterpret_cast<const uint32_t*>(b.weight);
  p.scale = b.scale;
  p.zero = s.has_minimum ? nullptr : b.zero;
  p.minimum = s.has_minimum ? b.minimum : nullptr;
}

const char* name_of(int kernel) { return kAbqKernels[kernel].name; }

cudaError_t simple(const GemmShape& s, const GemmBuffers& b, cudaStream_t stream) {
  AbqArgs p = simple_args(s);
  carve_simple(p, s, b.workspace);
  set_weights(p, s, b);
  p.bias = b.bias, p.y = b.y;
  const cudaError_t error = norm_input(s, b, p.normed, p.x, stream);
  if (error != cudaSuccess) return error;
  return with_dtype(s.dtype, [&](auto t) { return run_simple<decltype(t)>(p, stream); });
}

cudaError_t fast(Config config, const GemmShape& s, const GemmBuffers& b, const Device& device,
                 cudaStream_t stream) {
  const Plan plan = abq_plan(config.kernel, s, device);
  AbqGemmArgs p = fast_args(s);
  carve_fast(p, config.kernel, s, b.workspace);
  set_weights(p, s, b);
  p.bias = b.bias, p.y = b.y;
  p.stages = ceil_div(p.row_words, 4 * plan.tile.chunks);
  const AbqFamily family = kAbqKernels[config.kernel].family;
  const AbqForm form = abq_form(family, s);
  PrepareShape prepare = prepare_shape(family, s);
  prepare.n_counters = config.shares > 1 ? int(plan.tiles(s)) : 0;
  const cudaError_t error = prepare_tokens(prepare, b.x, norm_of(s, b), p.tokens, false, stream);
  if (error != cudaSuccess) return error;
  p.columns_per_token = plan.columns_per_token;
  const auto run = family == AbqFamily::kWeightOnly  ? abq_weight_only
                   : family == AbqFamily::kBinary    ? abq_binary
                   : family == AbqFamily::kWarpgroup ? abq_warpgroup
                                                     : abq_int8;
  return run(config.kernel, p, form, {config.shares, device, stream});
}

cudaError_t run(Config config, const GemmShape& s, const GemmBuffers& b, const Device& device,
                cudaStream_t stream) {
  return config.kernel == kSimple ? simple(s, b, stream) : fast(config, s, b, device, stream);
}

// clang-format off
constexpr KernelTable kTable = {"ABQGemm", kAbqKernelCount, name_of, supported, abq_plan,
                                abq_choose, workspace_of, abq_has_inputs, run};
// clang-format on
const OpRegistration registration(op_from_table<kTable>());

}  // namespace
}  // namespace anybit
