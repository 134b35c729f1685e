// ABQGemm for machines with AVX-512.
#if defined(__AVX512VNNI__)
#define ANYBIT_SET avx512
#include "abq_gemm/cpu/gemm.h"

namespace anybit::cpu {

void abq_gemm_avx512(const GemmShape& shape, const GemmBuffers& buffers, const Parallel& parallel) {
  avx512::abq_gemm(shape, buffers, parallel);
}

}  // namespace anybit::cpu
#endif
