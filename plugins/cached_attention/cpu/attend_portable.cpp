// Attention for any machine.
#define ANYBIT_SET portable
#include "cached_attention/cpu/attend.h"

namespace anybit::cpu {

int attend_portable(const AttentionShape& shape, const AttentionBuffers& buffers,
                    const Parallel& parallel) {
  return portable::attend(shape, buffers, parallel);
}

}  // namespace anybit::cpu
