// The families of fast QQQGemm kernels, each in a .cu file of its own, so that
// they compile side by side.
#pragma once
#include "core/host/frame.h"
#include "qqq_gemm/cuda/config.h"
#include "qqq_gemm/cuda/int8.cuh"
#include "qqq_gemm/cuda/warpgroup.cuh"

namespace anybit {

// Kernel `kernel` of kQqqKernels on prepared tokens.
cudaError_t qqq_int8(int kernel, const QqqGemmArgs& p, const Split& split);
cudaError_t qqq_warpgroup(int kernel, const QqqGemmArgs& p, const Split& split);

// What the templates of a family are instantiated with, as a value.
template <class Weights_, class Shape_>
struct QqqInstance {
  using Weights = Weights_;
  using Shape = Shape_;
};

// f(QqqInstance) for the row of kQqqKernels, if it is of this family.
template <QqqFamily kFamily, class F>
cudaError_t with_qqq_kernel(int kernel, bool grouped, F f) {
  return with_index<kQqqKernelCount>(kernel, [&](auto k) {
    if constexpr (kQqqKernels[k.value].family != kFamily) {
      return cudaErrorInvalidValue;
    } else {
      constexpr Tile t = qqq_tile(kQqqKernels[k.value]);
      using Shape = TileShape<t.warps, t.row_tiles, t.token_tiles, t.chunks, t.stages>;
      return grouped ? f(QqqInstance<GroupWeights, Shape>())
                     : f(QqqInstance<ChannelWeights, Shape>());
    }
  });
}

}  // namespace anybit
