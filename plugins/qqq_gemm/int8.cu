// Instances of the int8 kernels of QQQGemm: per channel or per group x tile, from the table in config.h.
#include "qqq_gemm/families.h"

namespace anybit {

cudaError_t qqq_int8(int kernel, const QqqGemmArgs& p, const Split& split) {
  return with_index<kQqqKernelCount>(kernel, [&](auto index) {
    if constexpr (index.value == kSimple) {
      return cudaErrorInvalidValue;
    } else {
      constexpr Tile t = kQqqKernels[index.value].tile;
      constexpr bool kSplitSteps = t.rows() == 64;
      using Shape = TileShape<t.warps, t.row_tiles, t.token_tiles, t.chunks, t.stages>;
      return p.group_size ? launch_gemm<QqqInt8<GroupWeights, kSplitSteps, Shape>>(p, split)
                          : launch_gemm<QqqInt8<ChannelWeights, kSplitSteps, Shape>>(p, split);
    }
  });
}

}  // namespace anybit
