// Instances of the int8 kernels of QQQGemm.
#include "qqq_gemm/families.h"

namespace anybit {
namespace {

struct Int8 {
  const QqqGemmArgs& p;
  const Split& split;

  template <class Weights, class Shape>
  cudaError_t run() const {
    return launch_gemm<QqqInt8<Weights, Shape::kRows == 64, Shape>>(p, split);
  }
};

}  // namespace

cudaError_t qqq_int8(int kernel, const QqqGemmArgs& p, const Split& split) {
  return with_qqq_kernel<QqqFamily::kInt8>(kernel, p.group_size != 0, Int8{p, split});
}

}  // namespace anybit
