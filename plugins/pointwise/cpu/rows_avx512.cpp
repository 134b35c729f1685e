// Pointwise kernels for machines with AVX-512.
#if defined(__AVX512F__)
#define ANYBIT_SET avx512
#include "pointwise/cpu/rows.h"

namespace anybit::cpu {

const Pointwise pointwise_avx512{avx512::sum, avx512::activation, avx512::norm, avx512::heads};

}  // namespace anybit::cpu
#endif
