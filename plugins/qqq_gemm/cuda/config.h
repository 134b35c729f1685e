// The kernels of QQQGemm, which of them can run a shape, and which one should.
#pragma once
#include "core/host/config.h"

namespace anybit {

enum class QqqFamily {
  kSimple,     // kernel.cuh: the oracle, and what no other runs
  kInt8,       // int8.cuh
  kWarpgroup,  // warpgroup.cuh: many tokens, compute capability 9.0
};
struct QqqKernel {
  QqqFamily family;
  const char* name;  // for benchmarks and the self-test: family, weight rows x tokens of a tile
  Tile tile;
};

// Every kernel: launch.cu lists them by number, the families' .cu files instantiate the
// templates from the same rows.
constexpr QqqKernel kQqqKernels[] = {
    {QqqFamily::kSimple, "simple", {}},
    {QqqFamily::kInt8, "int8 64x8", {4, 1, 1, 4, 3}},
    {QqqFamily::kInt8, "int8 64x16", {4, 1, 2, 4, 3}},
    {QqqFamily::kInt8, "int8 64x32", {4, 1, 4, 4, 3}},
    {QqqFamily::kInt8, "int8 64x64", {4, 1, 8, 2, 3}},
    {QqqFamily::kInt8, "int8 256x64", {4, 4, 8, 1, 4}},
    {QqqFamily::kWarpgroup, "wgmma 256x64", {8, 2, 8, 2, 4}},
    {QqqFamily::kWarpgroup, "wgmma 256x128", {8, 2, 16, 2, 4}},
};
constexpr int kQqqKernelCount = sizeof(kQqqKernels) / sizeof(QqqKernel);

inline int qqq_k_pad(const GemmShape& s) { return round_up(s.k, 16); }
inline int qqq_n_pad(const GemmShape& s) { return round_up(s.n, 64); }
inline int qqq_chunks(const GemmShape& s) { return ceil_div(s.k, 128); }

constexpr size_t qqq_slot_bytes(const Tile& tile) {
  return size_t(tile.chunks) * (tile.rows() * 64 + tile.tokens() * 128);
}

// The tile as it is instantiated.
constexpr Tile qqq_tile(const QqqKernel& kernel) {
  return kernel.family == QqqFamily::kWarpgroup
             ? warpgroup_tile(kernel.tile, qqq_slot_bytes(kernel.tile))
             : kernel.tile;
}

// How kernel `kernel` would run a shape that the op takes.
inline Plan qqq_plan(int kernel, const GemmShape& s, const Device& device) {
  Plan plan;
  if (kernel == kSimple) {
    plan.runs = true;
    return plan;
  }
  plan.warpgroup = kQqqKernels[kernel].family == QqqFamily::kWarpgroup;
  plan.tile = qqq_tile(kQqqKernels[kernel]);
  plan.slot_bytes = qqq_slot_bytes(plan.tile);
  plan.most_shares = ceil_div(qqq_chunks(s), plan.tile.chunks);
  plan.runs = plan.fits(s, device) &&
              // per channel the sums are 16 times as large
              (s.group_size || int64_t{16 * 8 * 127} * s.k < int64_t{1} << 31);
  return plan;
}

// The choice where nothing has been measured: the smallest tile that holds all tokens; for more
// than it holds the largest, if it fills the GPU. For many tokens the tile of warpgroup.cuh, where
// it runs, that costs least.
inline int qqq_choose(const GemmShape& s, const Device& device) {
  if (const int kernel = choose_warpgroup(qqq_plan, kQqqKernelCount, s, device)) return kernel;
  int best = kSimple;
  for (int kernel = 1; kernel < kQqqKernelCount; ++kernel) {
    const Plan plan = qqq_plan(kernel, s, device);
    if (!plan.runs || plan.warpgroup) continue;
    if (best != kSimple && kQqqKernels[best].tile.tokens() == plan.tile.tokens() &&
        plan.tiles(s) < device.multiprocessors)
      continue;
    if (best != kSimple && kQqqKernels[best].tile.tokens() >= s.m &&
        kQqqKernels[best].tile.rows() == 64)
      continue;
    best = kernel;
  }
  return best;
}

}  // namespace anybit
