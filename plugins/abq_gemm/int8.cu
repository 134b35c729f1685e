// Instances of the int8 kernels of ABQGemm: planes in registers x unit of groups x tile, from the table in config.h.
#include "abq_gemm/families.h"

namespace anybit {
namespace {

constexpr int kPlaneCounts[] = {2, 4, 8};
constexpr int kUnitWords[] = {4, 2, 1};

template <int kPlanes, int kTile>
constexpr Tile kTileOf = abq_tile(kAbqInt8Tiles[kTile], kPlanes);

template <int kPlanes, int kWords, bool kGrouped, int kTile>
cudaError_t run(const AbqGemmArgs& p, const Split& split) {
  constexpr Tile t = kTileOf<kPlanes, kTile>;
  if constexpr (kGrouped && t.outputs_per_thread() > kAbqMostGroupedOutputs) return cudaErrorInvalidValue;
  else return launch_gemm<AbqInt8<kPlanes, kWords, kGrouped, TileShape<t.warps, t.row_tiles, t.token_tiles, t.chunks, t.stages>>>(p, split);
}

}  // namespace

cudaError_t abq_int8(const AbqGemmArgs& p, const AbqForm& form, int tile, const Split& split) {
  return with_index<3>(form.planes == 2 ? 0 : form.planes == 4 ? 1 : 2, [&](auto planes) {
    return with_index<kAbqInt8TileCount>(tile, [&](auto t) {
      constexpr int kPlanes = kPlaneCounts[planes.value], kTile = t.value;
      if (!form.grouped) return run<kPlanes, 4, false, kTile>(p, split);
      return with_index<3>(form.words == 4 ? 0 : form.words == 2 ? 1 : 2, [&](auto words) {
        return run<kPlanes, kUnitWords[words.value], true, kTile>(p, split);
      });
    });
  });
}

}  // namespace anybit
