// Instances of the kernels of QQQGemm for compute capability 9.0.
#include "qqq_gemm/families.h"

namespace anybit {
namespace {

struct Warpgroup {
  const QqqGemmArgs& p;
  const Split& split;

  template <class Weights, class Shape>
  cudaError_t run() const {
    return launch_warpgroups<QqqWarpgroup<Weights, WarpgroupShape<Shape>>>(p, split);
  }
};

}  // namespace

cudaError_t qqq_warpgroup(int kernel, const QqqGemmArgs& p, const Split& split) {
  return with_qqq_kernel<QqqFamily::kWarpgroup>(kernel, p.group_size != 0, Warpgroup{p, split});
}

}  // namespace anybit
