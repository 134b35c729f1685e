// The families of fast ABQGemm kernels, each in a .cu file of its own, so that
// they compile side by side.
#pragma once
#include "abq_gemm/cuda/binary.cuh"
#include "abq_gemm/cuda/config.h"
#include "abq_gemm/cuda/int8.cuh"
#include "abq_gemm/cuda/warpgroup.cuh"
#include "abq_gemm/cuda/weight_only.cuh"
#include "core/host/frame.h"

namespace anybit {

// Kernel `kernel` of kAbqKernels on prepared tokens.
cudaError_t abq_int8(int kernel, const AbqGemmArgs& p, const AbqForm& form, const Split& split);
cudaError_t abq_binary(int kernel, const AbqGemmArgs& p, const AbqForm& form, const Split& split);
cudaError_t abq_warpgroup(int kernel, const AbqGemmArgs& p, const AbqForm& form,
                          const Split& split);
cudaError_t abq_weight_only(int kernel, const AbqGemmArgs& p, const AbqForm& form,
                            const Split& split);

// What the templates of a family are instantiated with, as a value.
template <int kPlanes_, int kWords_, bool kGrouped_, class Shape_>
struct AbqInstance {
  static constexpr int kPlanes = kPlanes_, kWords = kWords_;
  static constexpr bool kGrouped = kGrouped_;
  using Shape = Shape_;
};

// f(AbqInstance) for the row of kAbqKernels and the form, if the row is of this family and has it.
template <AbqFamily kFamily, class F>
cudaError_t with_abq_kernel(int kernel, const AbqForm& form, F f) {
  return with_index<kAbqKernelCount>(kernel, [&](auto k) {
    constexpr AbqKernel row = kAbqKernels[k.value];
    if constexpr (row.family != kFamily) {
      return cudaErrorInvalidValue;
    } else {
      const int planes_index = form.planes == 2 ? 0 : form.planes == 4 ? 1 : 2;
      return with_index<3>(planes_index, [&](auto p) {
        constexpr int kPlanes = 2 << p.value;
        constexpr Tile t = abq_tile(kFamily, row.tile, kPlanes);
        using Shape = TileShape<t.warps, t.row_tiles, t.token_tiles, t.chunks, t.stages>;
        constexpr bool kHasPlanes = kFamily != AbqFamily::kWeightOnly || kPlanes > 2;
        constexpr bool kHasGroups = t.outputs_per_thread() <= abq_most_grouped_outputs(kFamily);
        if constexpr (!kHasPlanes) {
          return cudaErrorInvalidValue;
        } else {
          if (!form.grouped) return f(AbqInstance<kPlanes, 4, false, Shape>());
          if constexpr (kHasGroups) {
            if (form.words == 4) return f(AbqInstance<kPlanes, 4, true, Shape>());
            if constexpr (kFamily != AbqFamily::kWarpgroup) {
              if (form.words == 1) return f(AbqInstance<kPlanes, 1, true, Shape>());
            }
            if constexpr (kFamily == AbqFamily::kInt8)
              return f(AbqInstance<kPlanes, 2, true, Shape>());
          }
          return cudaErrorInvalidValue;
        }
      });
    }
  });
}

}  // namespace anybit
