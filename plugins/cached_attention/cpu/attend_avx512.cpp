// Attention for machines with AVX-512.
#if defined(__AVX512VNNI__)
#define ANYBIT_SET avx512
#include "cached_attention/cpu/attend.h"

namespace anybit::cpu {

int attend_avx512(const AttentionShape& shape, const AttentionBuffers& buffers,
                  const Parallel& parallel) {
  return avx512::attend(shape, buffers, parallel);
}

}  // namespace anybit::cpu
#endif
