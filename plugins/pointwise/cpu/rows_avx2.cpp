// Pointwise kernels for machines with AVX2.
#if defined(__AVX2__)
#define ANYBIT_SET avx2
#include "pointwise/cpu/rows.h"

namespace anybit::cpu {

const Pointwise pointwise_avx2{avx2::sum, avx2::activation, avx2::norm, avx2::heads};

}  // namespace anybit::cpu
#endif
