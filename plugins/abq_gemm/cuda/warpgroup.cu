// Instances of the kernels of ABQGemm for compute capability 9.0.
#include "abq_gemm/cuda/families.h"

namespace anybit {

cudaError_t abq_warpgroup(int kernel, const AbqGemmArgs& p, const AbqForm& form,
                          const Split& split) {
  return with_abq_kernel<AbqFamily::kWarpgroup>(kernel, form, [&](auto instance) {
    using I = decltype(instance);
    static_assert(I::kWords == 4, "units are whole chunks");
    return launch_warpgroups<
        AbqWarpgroup<I::kPlanes, I::kGrouped, WarpgroupShape<typename I::Shape>>>(p, split);
  });
}

}  // namespace anybit
