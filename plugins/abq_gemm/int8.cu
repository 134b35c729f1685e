// Instances of the int8 kernels of ABQGemm.
#include "abq_gemm/families.h"

namespace anybit {
namespace {

struct Int8 {
  const AbqGemmArgs& p;
  const Split& split;

  template <int kPlanes, int kWords, bool kGrouped, class Shape>
  cudaError_t run() const {
    return launch_gemm<AbqInt8<kPlanes, kWords, kGrouped, Shape>>(p, split);
  }
};

}  // namespace

cudaError_t abq_int8(int kernel, const AbqGemmArgs& p, const AbqForm& form, const Split& split) {
  return with_abq_kernel<AbqFamily::kInt8>(kernel, form, Int8{p, split});
}

}  // namespace anybit
