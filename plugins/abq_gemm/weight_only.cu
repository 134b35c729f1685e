// Instances of the weight-only kernels of ABQGemm.
#include "abq_gemm/families.h"

namespace anybit {
namespace {

template <class T>
struct WeightOnly {
  const AbqGemmArgs& p;
  const Split& split;

  template <int kPlanes, int kWords, bool kGrouped, class Shape>
  cudaError_t run() const {
    return launch_gemm<AbqWeightOnly<T, kPlanes, kWords, kGrouped, Shape>>(p, split);
  }
};

}  // namespace

cudaError_t abq_weight_only(int kernel, const AbqGemmArgs& p, const AbqForm& form, const Split& split) {
  if (p.dtype == kFloat16) return with_abq_kernel<AbqFamily::kWeightOnly>(kernel, form, WeightOnly<__half>{p, split});
  return with_abq_kernel<AbqFamily::kWeightOnly>(kernel, form, WeightOnly<__nv_bfloat16>{p, split});
}

}  // namespace anybit
