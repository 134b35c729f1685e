// Instances of the kernels of ABQGemm for compute capability 9.0.
#include "abq_gemm/families.h"

namespace anybit {
namespace {

struct Warpgroup {
  const AbqGemmArgs& p;
  const Split& split;

  template <int kPlanes, int kWords, bool kGrouped, class Shape>
  cudaError_t run() const {
    static_assert(kWords == 4, "units are whole chunks");
    return launch_warpgroups<AbqWarpgroup<kPlanes, kGrouped, WarpgroupShape<Shape>>>(p, split);
  }
};

}  // namespace

cudaError_t abq_warpgroup(int kernel, const AbqGemmArgs& p, const AbqForm& form, const Split& split) {
  return with_abq_kernel<AbqFamily::kWarpgroup>(kernel, form, Warpgroup{p, split});
}

}  // namespace anybit
