// ABQGemm for any machine.
#define ANYBIT_SET portable
#include "abq_gemm/cpu/gemm.h"

namespace anybit::cpu {

void abq_gemm_portable(const GemmShape& shape, const GemmBuffers& buffers,
                       const Parallel& parallel) {
  portable::abq_gemm(shape, buffers, parallel);
}

}  // namespace anybit::cpu
