// Instances of the binary kernels of ABQGemm.
#include "abq_gemm/families.h"

namespace anybit {
namespace {

struct Binary {
  const AbqGemmArgs& p;
  const Split& split;

  template <int kPlanes, int, bool, class Shape>
  cudaError_t run() const {
    return launch_gemm<AbqBinary<kPlanes, Shape>>(p, split);
  }
};

}  // namespace

cudaError_t abq_binary(int kernel, const AbqGemmArgs& p, const AbqForm& form, const Split& split) {
  return with_abq_kernel<AbqFamily::kBinary>(kernel, form, Binary{p, split});
}

}  // namespace anybit
