// Instances of the weight-only kernels of ABQGemm.
#include "abq_gemm/cuda/families.h"

namespace anybit {

cudaError_t abq_weight_only(int kernel, const AbqGemmArgs& p, const AbqForm& form,
                            const Split& split) {
  return with_abq_kernel<AbqFamily::kWeightOnly>(kernel, form, [&](auto instance) {
    using I = decltype(instance);
    if (p.dtype == kFloat16)
      return launch_gemm<
          AbqWeightOnly<__half, I::kPlanes, I::kWords, I::kGrouped, typename I::Shape>>(p, split);
    return launch_gemm<
        AbqWeightOnly<__nv_bfloat16, I::kPlanes, I::kWords, I::kGrouped, typename I::Shape>>(p,
                                                                                             split);
  });
}

}  // namespace anybit
