// Choice of kernel, tile and shares of K: pure functions of the shape and the GPU, so that
// they are tested without one.
//
// A tactic is what TensorRT may time and pass to setTactic(): kTacticKernel * kernel + shares;
// 0 leaves the choice to us.
#pragma once
#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "core/host/params.h"

namespace anybit {

// What the choice needs to know about a GPU.
struct Device {
  int sm;  // compute capability: 80, 89, 90, ...
  int multiprocessors;
  int shared_per_block;  // bytes that a block may have after opting in
  int shared_per_sm;     // bytes of all blocks of a multiprocessor
};

// One row of a kernel table. A block covers 16 * warps * row_tiles weight rows and 8 * token_tiles
// tokens and walks K in slots of chunks * 128 elements, `stages` of which are in shared memory.
struct Tile {
  int warps, row_tiles, token_tiles, chunks, stages;

  constexpr int rows() const { return 16 * warps * row_tiles; }
  constexpr int tokens() const { return 8 * token_tiles; }
  constexpr int threads() const { return 32 * warps; }
  constexpr int outputs_per_thread() const { return 4 * row_tiles * token_tiles; }
  // of a thread, about (python -m plugins sass)
  constexpr int registers() const { return outputs_per_thread() <= 8 ? 104 : 232; }
  // of staged outputs, so that a warp's stores meet different banks
  constexpr int pitch() const { return rows() + 4; }
};

// Bytes of shared memory: the ring of slots, or the staged outputs if they are larger.
constexpr size_t gemm_shared_bytes(const Tile& tile, size_t slot_bytes) {
  const size_t ring = slot_bytes * tile.stages;
  const size_t staged = sizeof(float) * tile.tokens() * tile.pitch();
  return ring > staged ? ring : staged;
}

// Kernels of warpgroup.cuh: as many slots as fit a multiprocessor of compute capability 9.0,
// and room for their barriers.
constexpr size_t kWarpgroupRing = 200 << 10, kWarpgroupBarriers = 128;
constexpr int kWarpgroupTokens = 33;  // from here on they are chosen
constexpr Tile warpgroup_tile(Tile tile, size_t slot_bytes) {
  if (tile.stages * slot_bytes > kWarpgroupRing) tile.stages = int(kWarpgroupRing / slot_bytes);
  return tile;
}

template <class T>
constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}
template <class T>
constexpr T round_up(T a, T b) {
  return ceil_div(a, b) * b;
}

// A kernel of an op's table and the number of blocks that share the K of one tile.
struct Config {
  int kernel;
  int shares;
};

constexpr int kTacticKernel = 64;
constexpr int kMostShares = kTacticKernel - 1;

constexpr int32_t tactic_from_config(Config c) { return kTacticKernel * (c.kernel + 1) + c.shares; }
constexpr Config config_from_tactic(int32_t tactic) {
  return {tactic / kTacticKernel - 1, tactic % kTacticKernel};
}

constexpr int kSimple = 0;  // the simple kernel of every op
constexpr int64_t kMostGridY = 65535;
// of partial sums: the workspace must be known where an engine is built, maybe without a GPU
constexpr size_t kPartialBytes = 8 << 20;

// How one kernel of an op's table would run a shape. The simple one runs
// everything, and has no tile.
struct Plan {
  bool runs = false;
  bool warpgroup = false;  // a kernel of warpgroup.cuh
  Tile tile = {};
  int columns_per_token = 1;  // of the tile's: its bit planes where those are multiplied
  size_t slot_bytes = 0;
  int most_shares = 1;  // shares of K that are whole slots and whole groups

  size_t shared_bytes() const {
    return gemm_shared_bytes(tile, slot_bytes) + (warpgroup ? kWarpgroupBarriers : 0);
  }

  int64_t token_tiles(const GemmShape& s) const {
    return ceil_div(int64_t{columns_per_token} * s.m, int64_t{tile.tokens()});
  }
  int64_t tiles(const GemmShape& s) const {  // at least 1, also without tokens
    const int64_t count = token_tiles(s);
    return ceil_div<int64_t>(s.n, tile.rows()) * (count ? count : 1);
  }
  // Whether the GPU has the instructions and the shared memory, and the launch the size.
  bool fits(const GemmShape& s, const Device& device) const {
    const bool has_instructions = warpgroup ? device.sm == 90 : device.sm >= 80;
    return has_instructions && shared_bytes() <= size_t(device.shared_per_block) &&
           token_tiles(s) <= kMostGridY;
  }
  // Blocks that run at the same time on the whole GPU, as shared memory and
  // (roughly known) registers decide.
  int resident_blocks(const Device& device) const {
    const int by_shared = int(device.shared_per_sm / (shared_bytes() + 1024));
    const int by_registers = 65536 / (tile.threads() * tile.registers());
    const int per_sm = by_shared < by_registers ? by_shared : by_registers;
    return device.multiprocessors * (per_sm < 1 ? 1 : per_sm);
  }
  // Partial sums have room for this many blocks, whatever the number of tokens and the GPU; K of
  // more tiles is never shared.
  int most_split_blocks() const {
    return int(kPartialBytes / (sizeof(int32_t) * tile.rows() * tile.tokens()));
  }
};
using Planner = Plan (*)(int kernel, const GemmShape& shape, const Device& device);

// About the cycles for 128 k of all tiles of warpgroup.cuh, which come in whole waves over the
// multiprocessors: a tile takes as long as the tensor cores (4096 products a cycle), the
// second-level cache (24 bytes a cycle for each multiprocessor, an assumption to be measured) or
// shared memory (128 bytes) need.
inline int64_t warpgroup_cost(const Plan& plan, const GemmShape& s, const Device& device) {
  const int rows = plan.tile.rows(), tokens = plan.tile.tokens();
  const int filled = int(plan.slot_bytes / plan.tile.chunks), weights = filled - tokens * 128;
  int cycles = rows * tokens * 128 / 4096;
  for (const int other : {filled / 24, (rows / 64 * tokens * 128 + weights + filled) / 128})
    cycles = cycles > other ? cycles : other;
  return ceil_div(plan.tiles(s), int64_t{device.multiprocessors}) * cycles;
}

// The kernel of warpgroup.cuh that costs least, the later one of equals; kSimple for
// few tokens, or if none runs.
inline int choose_warpgroup(Planner plan_of, int kernel_count, const GemmShape& s,
                            const Device& device) {
  int best = kSimple;
  int64_t best_cost = INT64_MAX;
  for (int kernel = 1; s.m >= kWarpgroupTokens && kernel < kernel_count; ++kernel) {
    const Plan plan = plan_of(kernel, s, device);
    if (!plan.runs || !plan.warpgroup) continue;
    const int64_t cost = warpgroup_cost(plan, s, device);
    if (cost <= best_cost) best = kernel, best_cost = cost;
  }
  return best;
}

// At most `wanted` shares, and no more than K and the room for partial sums allow.
inline int limited_shares(const Plan& plan, int64_t wanted, const GemmShape& s) {
  if (plan.most_shares == 1) return 1;
  const int64_t room = plan.most_split_blocks() / plan.tiles(s);
  for (const int64_t most : {room, int64_t(plan.most_shares), int64_t(kMostShares)})
    wanted = wanted < most ? wanted : most;
  return wanted < 1 ? 1 : int(wanted);
}

// The kernel with the shares of K that fill the GPU once: all multiprocessors then read
// weights at the same time.
inline Config filling_config(int kernel, const Plan& plan, const GemmShape& s,
                             const Device& device) {
  return {kernel, plan.most_shares == 1
                      ? 1
                      : limited_shares(plan, plan.resident_blocks(device) / plan.tiles(s), s)};
}

}  // namespace anybit
