// Instances of the binary kernels of ABQGemm.
#include "abq_gemm/cuda/families.h"

namespace anybit {

cudaError_t abq_binary(int kernel, const AbqGemmArgs& p, const AbqForm& form, const Split& split) {
  return with_abq_kernel<AbqFamily::kBinary>(kernel, form, [&](auto instance) {
    using I = decltype(instance);
    return launch_gemm<AbqBinary<I::kPlanes, typename I::Shape>>(p, split);
  });
}

}  // namespace anybit
