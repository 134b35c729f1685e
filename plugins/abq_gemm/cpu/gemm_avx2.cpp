// ABQGemm for machines with AVX2.
#if defined(__AVX2__)
#define ANYBIT_SET avx2
#include "abq_gemm/cpu/gemm.h"

namespace anybit::cpu {

void abq_gemm_avx2(const GemmShape& shape, const GemmBuffers& buffers, const Parallel& parallel) {
  avx2::abq_gemm(shape, buffers, parallel);
}

}  // namespace anybit::cpu
#endif
