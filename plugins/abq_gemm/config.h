// The kernels of ABQGemm, which of them can run a shape, and which one should.
#pragma once
#include "core/config.h"

namespace anybit {

// In the order of kAbqTiles, behind the simple kernel; names appear in benchmarks and in the self-test.
enum AbqKernel : int { kAbqSimple, kAbqInt8T8, kAbqInt8T16, kAbqInt8T64, kAbqInt8Large, kAbqKernels };
constexpr const char* kAbqKernelNames[kAbqKernels] = {"simple", "int8 64x8", "int8 64x16", "int8 128x64", "int8 256x64"};

constexpr Tile kAbqInt8Tiles[] = {{4, 1, 1, 4, 3}, {4, 1, 2, 4, 3}, {8, 1, 8, 2, 3}, {8, 2, 8, 2, 2}};
constexpr int kAbqInt8TileCount = sizeof(kAbqInt8Tiles) / sizeof(Tile);
constexpr int kAbqMostGroupedOutputs = 32;  // per thread, because groups need fp32 and integer accumulators in registers

// How a shape's planes and groups pick a template: planes 2, 4 or 8 in registers, units of planes.cuh, one scale per row or several.
struct AbqForm {
  int planes;
  int words;
  bool grouped;
};

inline int abq_group_len(const GemmShape& s) { return s.group_size ? s.group_size : s.k; }
inline int abq_group_words(const GemmShape& s) { return ceil_div(abq_group_len(s), 32); }
inline int abq_n_groups(const GemmShape& s) { return s.k / abq_group_len(s); }
inline int abq_row_words(const GemmShape& s) { return round_up(abq_n_groups(s) * abq_group_words(s), 4); }

inline AbqForm abq_form(const GemmShape& s) {
  const int words = abq_group_words(s), groups = abq_n_groups(s);
  return {s.planes <= 2 ? 2 : s.planes <= 4 ? 4 : 8, groups == 1 || words % 4 == 0 ? 4 : words % 2 == 0 ? 2 : 1, groups > 1};
}

// The tile with slots that stay small: 8 planes take half as much of K.
constexpr Tile abq_tile(Tile tile, int planes) {
  if (planes == 8) tile.chunks /= 2;
  return tile;
}

constexpr size_t abq_slot_bytes(const Tile& tile, int planes) {
  return size_t(planes) * tile.rows() * tile.chunks * 16 + size_t(tile.chunks) * tile.tokens() * 128;
}

// How kernel `kernel` would run a shape that the op takes.
inline Plan abq_plan(int kernel, const GemmShape& s, const Device& device) {
  Plan plan;
  if (kernel == kAbqSimple) {
    plan.runs = true;
    return plan;
  }
  const AbqForm form = abq_form(s);
  plan.tile = abq_tile(kAbqInt8Tiles[kernel - kAbqInt8T8], form.planes);
  plan.shared_bytes = gemm_shared_bytes(plan.tile, abq_slot_bytes(plan.tile, form.planes));
  const bool whole_groups = !form.grouped || 4 * plan.tile.chunks % abq_group_words(s) == 0;
  plan.most_shares = whole_groups ? ceil_div(abq_row_words(s), 4 * plan.tile.chunks) : 1;
  plan.runs = s.abits <= 8 && device.sm >= 80 && plan.shared_bytes <= size_t(device.shared_per_block) &&
              ceil_div<int64_t>(s.m, plan.tile.tokens()) <= kMostGridY &&
              !(form.grouped && plan.tile.outputs_per_thread() > kAbqMostGroupedOutputs) &&
              int64_t{256} * (s.levels - 1) * abq_group_len(s) < int64_t{1} << 31;  // P - z * Q of a group fits 32 bits
  return plan;
}

// The choice where nothing has been measured: the smallest tile that holds all tokens; the largest only if it fills the GPU.
inline int abq_choose(const GemmShape& s, const Device& device) {
  int best = kAbqSimple;
  for (int kernel = kAbqInt8T8; kernel < kAbqKernels; ++kernel) {
    const Plan plan = abq_plan(kernel, s, device);
    if (!plan.runs || (kernel == kAbqInt8Large && plan.tiles(s) < device.multiprocessors)) continue;
    best = kernel;
    if (plan.tile.tokens() >= s.m) break;
  }
  return best;
}

}  // namespace anybit
