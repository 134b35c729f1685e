// QQQGemm for machines with AVX-512.
#if defined(__AVX512VNNI__)
#define ANYBIT_SET avx512
#include "qqq_gemm/cpu/gemm.h"

namespace anybit::cpu {

void qqq_gemm_avx512(const GemmShape& shape, const GemmBuffers& buffers, const Parallel& parallel) {
  avx512::qqq_gemm(shape, buffers, parallel);
}

}  // namespace anybit::cpu
#endif
