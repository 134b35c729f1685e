// QQQGemm for machines with AVX2.
#if defined(__AVX2__)
#define ANYBIT_SET avx2
#include "qqq_gemm/cpu/gemm.h"

namespace anybit::cpu {

void qqq_gemm_avx2(const GemmShape& shape, const GemmBuffers& buffers, const Parallel& parallel) {
  avx2::qqq_gemm(shape, buffers, parallel);
}

}  // namespace anybit::cpu
#endif
