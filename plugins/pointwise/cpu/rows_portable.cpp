// Pointwise kernels for any machine.
#define ANYBIT_SET portable
#include "pointwise/cpu/rows.h"

namespace anybit::cpu {

const Pointwise pointwise_portable{portable::sum, portable::activation, portable::norm,
                                   portable::heads};

}  // namespace anybit::cpu
