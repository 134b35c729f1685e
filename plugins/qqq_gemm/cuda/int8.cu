// Instances of the int8 kernels of QQQGemm.
#include "qqq_gemm/cuda/families.h"

namespace anybit {

cudaError_t qqq_int8(int kernel, const QqqGemmArgs& p, const Split& split) {
  return with_qqq_kernel<QqqFamily::kInt8>(kernel, p.group_size != 0, [&](auto instance) {
    using I = decltype(instance);
    return launch_gemm<QqqInt8<typename I::Weights, I::Shape::kRows == 64, typename I::Shape>>(
        p, split);
  });
}

}  // namespace anybit
