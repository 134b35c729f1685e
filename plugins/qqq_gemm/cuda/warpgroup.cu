// Instances of the kernels of QQQGemm for compute capability 9.0.
#include "qqq_gemm/cuda/families.h"

namespace anybit {

cudaError_t qqq_warpgroup(int kernel, const QqqGemmArgs& p, const Split& split) {
  return with_qqq_kernel<QqqFamily::kWarpgroup>(kernel, p.group_size != 0, [&](auto instance) {
    using I = decltype(instance);
    return launch_warpgroups<QqqWarpgroup<typename I::Weights, WarpgroupShape<typename I::Shape>>>(
        p, split);
  });
}

}  // namespace anybit
