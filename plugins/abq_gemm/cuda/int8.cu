// Instances of the int8 kernels of ABQGemm.
#include "abq_gemm/cuda/families.h"

namespace anybit {

cudaError_t abq_int8(int kernel, const AbqGemmArgs& p, const AbqForm& form, const Split& split) {
  return with_abq_kernel<AbqFamily::kInt8>(kernel, form, [&](auto instance) {
    using I = decltype(instance);
    return launch_gemm<AbqInt8<I::kPlanes, I::kWords, I::kGrouped, typename I::Shape>>(p, split);
  });
}

}  // namespace anybit
