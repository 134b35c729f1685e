// QQQGemm for any machine.
#define ANYBIT_SET portable
#include "qqq_gemm/cpu/gemm.h"

namespace anybit::cpu {

void qqq_gemm_portable(const GemmShape& shape, const GemmBuffers& buffers,
                       const Parallel& parallel) {
  portable::qqq_gemm(shape, buffers, parallel);
}

}  // namespace anybit::cpu
