// ABQGemm for machines with the dot product of int8 in NEON.
#if defined(__ARM_FEATURE_DOTPROD)
#define ANYBIT_SET neon
#include "abq_gemm/cpu/gemm.h"

namespace anybit::cpu {

void abq_gemm_neon(const GemmShape& shape, const GemmBuffers& buffers, const Parallel& parallel) {
  neon::abq_gemm(shape, buffers, parallel);
}

}  // namespace anybit::cpu
#endif
