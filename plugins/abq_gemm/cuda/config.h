// The kernels of ABQGemm, which of them can run a shape, and which one should.
#pragma once
#include "core/host/config.h"

namespace anybit {

enum class AbqFamily {
  kSimple,      // kernel.cuh: the oracle, and what no other runs
  kInt8,        // int8.cuh: A2..A8
  kBinary,      // binary.cuh: A2..A8, few tokens, one scale per row
  kWeightOnly,  // weight_only.cuh: A16 in fp16 or bf16
  kWarpgroup,   // warpgroup.cuh: A2..A8, many tokens, compute capability 9.0
};
struct AbqKernel {
  AbqFamily family;
  const char* name;  // for benchmarks and the self-test: family, weight rows x tokens of a tile
  Tile tile;
};

// Every kernel: launch.cu lists them by number, the families' .cu files instantiate the
// templates from the same rows.
constexpr AbqKernel kAbqKernels[] = {
    {AbqFamily::kSimple, "simple", {}},
    {AbqFamily::kInt8, "int8 64x8", {4, 1, 1, 4, 3}},
    {AbqFamily::kInt8, "int8 64x16", {4, 1, 2, 4, 3}},
    {AbqFamily::kInt8, "int8 128x32", {8, 1, 4, 2, 3}},
    {AbqFamily::kInt8, "int8 128x64", {8, 1, 8, 2, 3}},
    {AbqFamily::kInt8, "int8 256x64", {8, 2, 8, 2, 2}},
    {AbqFamily::kBinary, "b1 64x8", {4, 1, 1, 8, 2}},  // columns are planes of tokens
    {AbqFamily::kBinary, "b1 64x16", {4, 1, 2, 8, 2}},
    {AbqFamily::kWeightOnly, "a16 64x8", {4, 1, 1, 4, 3}},
    {AbqFamily::kWeightOnly, "a16 64x16", {4, 1, 2, 4, 3}},
    {AbqFamily::kWeightOnly, "a16 128x32", {8, 1, 4, 2, 3}},
    {AbqFamily::kWeightOnly, "a16 128x64", {8, 1, 8, 2, 2}},
    {AbqFamily::kWarpgroup, "wgmma 128x64", {8, 1, 8, 4, 4}},
    {AbqFamily::kWarpgroup, "wgmma 128x128", {8, 1, 16, 2, 4}},
    {AbqFamily::kWarpgroup, "wgmma 256x128", {8, 2, 16, 2, 4}},
};
constexpr int kAbqKernelCount = sizeof(kAbqKernels) / sizeof(AbqKernel);

// Most outputs of a thread where rows have groups: those need a second set of accumulators in
// registers, A16 even a third.
constexpr int abq_most_grouped_outputs(AbqFamily family) {
  switch (family) {
    case AbqFamily::kInt8: return 32;
    case AbqFamily::kWeightOnly: return 16;
    case AbqFamily::kWarpgroup: return 64;
    default: return 0;
  }
}

inline int abq_group_len(const GemmShape& s) { return s.group_size ? s.group_size : s.k; }
inline int abq_group_words(const GemmShape& s) { return ceil_div(abq_group_len(s), 32); }
inline int abq_n_groups(const GemmShape& s) { return s.k / abq_group_len(s); }
inline int abq_row_words(const GemmShape& s) {
  return round_up(abq_n_groups(s) * abq_group_words(s), 4);
}

// How a shape's planes and groups pick a template: planes in registers, unit of planes.cuh, one
// scale per row or several.
struct AbqForm {
  int planes;
  int words;
  bool grouped;
};

inline AbqForm abq_form(AbqFamily family, const GemmShape& s) {
  const int words = abq_group_words(s), groups = abq_n_groups(s);
  AbqForm form;
  form.planes = s.planes <= 2 ? 2 : s.planes <= 4 ? 4 : 8;
  form.words = groups == 1 || words % 4 == 0 ? 4 : words % 2 == 0 ? 2 : 1;
  form.grouped = groups > 1;
  // fewer instances, where conversions to 16 bits cost more than planes do
  if (family == AbqFamily::kWeightOnly) {
    if (form.planes == 2) form.planes = 4;
    if (form.words == 2) form.words = 1;
  }
  return form;
}

constexpr size_t abq_slot_bytes(AbqFamily family, const Tile& tile, int planes) {
  const size_t token_chunks = family == AbqFamily::kBinary       ? 1
                              : family == AbqFamily::kWeightOnly ? 2 * tile.chunks
                                                                 : tile.chunks;
  return size_t(planes) * tile.rows() * tile.chunks * 16 + token_chunks * tile.tokens() * 128;
}

// The tile with a ring that stays small: 8 planes take half as much of K, or fewer slots.
constexpr Tile abq_tile(AbqFamily family, Tile tile, int planes) {
  if (family == AbqFamily::kWarpgroup)
    return warpgroup_tile(tile, abq_slot_bytes(family, tile, planes));
  if (planes == 8) tile.chunks /= 2;
  return tile;
}

// Rows of prepared tokens that one token has.
inline int abq_columns(AbqFamily family, const GemmShape& s) {
  return family != AbqFamily::kBinary ? 1 : s.abits <= 2 ? 2 : s.abits <= 4 ? 4 : 8;
}

// Whether the family's arithmetic covers the shape.
inline bool abq_covers(AbqFamily family, const GemmShape& s) {
  if (family == AbqFamily::kWeightOnly) return s.abits == 16 && s.dtype != kFloat32;
  // groups of whole chunks
  if (family == AbqFamily::kWarpgroup && abq_form(family, s).words != 4) return false;
  // P - z * Q of a group fits 32 bits
  return s.abits <= 8 && int64_t{256} * (s.levels - 1) * abq_group_len(s) < int64_t{1} << 31;
}

// How kernel `kernel` would run a shape that the op takes.
inline Plan abq_plan(int kernel, const GemmShape& s, const Device& device) {
  const auto [family, name, tile] = kAbqKernels[kernel];
  Plan plan;
  if (family == AbqFamily::kSimple) {
    plan.runs = true;
    return plan;
  }
  const AbqForm form = abq_form(family, s);
  plan.warpgroup = family == AbqFamily::kWarpgroup;
  plan.tile = abq_tile(family, tile, form.planes);
  plan.columns_per_token = abq_columns(family, s);
  plan.slot_bytes = abq_slot_bytes(family, plan.tile, form.planes);
  const bool whole_groups = !form.grouped || 4 * plan.tile.chunks % abq_group_words(s) == 0;
  plan.most_shares = whole_groups ? ceil_div(abq_row_words(s), 4 * plan.tile.chunks) : 1;
  plan.runs = abq_covers(family, s) && plan.fits(s, device) &&
              !(form.grouped && plan.tile.outputs_per_thread() > abq_most_grouped_outputs(family));
  return plan;
}

// The choice where nothing has been measured: the smallest tile that holds all tokens, else the
// largest that fills the GPU. Counting bits comes first where one tile of it is enough, on GPUs
// whose binary tensor cores are known to be fast. For many tokens the tile of warpgroup.cuh, where
// it runs, that costs least.
inline int abq_choose(const GemmShape& s, const Device& device) {
  if (const int kernel = choose_warpgroup(abq_plan, kAbqKernelCount, s, device)) return kernel;
  int best = kSimple, best_tokens = -1;
  for (int kernel = 1; kernel < kAbqKernelCount; ++kernel) {
    const Plan plan = abq_plan(kernel, s, device);
    if (!plan.runs || plan.warpgroup) continue;
    if (kAbqKernels[kernel].family == AbqFamily::kBinary) {
      if (device.sm < 90 && plan.token_tiles(s) == 1 && plan.tile.token_tiles == 1) return kernel;
      continue;
    }
    if (s.m <= best_tokens ||
        (best_tokens == plan.tile.tokens() && plan.tiles(s) < device.multiprocessors))
      continue;
    best = kernel, best_tokens = plan.tile.tokens();
  }
  return best;
}

}  // namespace anybit
