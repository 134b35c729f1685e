// Attention for machines with AVX2.
#if defined(__AVX2__)
#define ANYBIT_SET avx2
#include "cached_attention/cpu/attend.h"

namespace anybit::cpu {

int attend_avx2(const AttentionShape& shape, const AttentionBuffers& buffers,
                const Parallel& parallel) {
  return avx2::attend(shape, buffers, parallel);
}

}  // namespace anybit::cpu
#endif
