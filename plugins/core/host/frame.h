// Host side of every op: where the parts of the workspace lie, which GPU this is, and how a table
// index becomes a template.
#pragma once
#include <type_traits>
#include <utility>

#include "core/device/pipeline.cuh"
#include "core/device/warpgroup.cuh"
#include "core/host/config.h"
#include "core/host/launch.h"
#include "core/host/measured.h"
#include "core/host/ops.h"
#include "core/host/prepare.h"

namespace anybit {

// Hands out aligned parts of one buffer; with no buffer it only counts.
class Carver {
 public:
  explicit Carver(void* buffer) : at_(static_cast<char*>(buffer)) {}
  template <class T>
  T* take(size_t count) {
    used_ = round_up(used_, size_t(128));
    T* part = at_ ? reinterpret_cast<T*>(at_ + used_) : nullptr;
    used_ += count * sizeof(T);
    return part;
  }
  size_t used() const { return used_; }

 private:
  char* at_;
  size_t used_ = 0;
};

// Lays out what the token kernel of `shape` writes; n_groups 0: no sums.
inline void carve_tokens(Carver& carver, Tokens& tokens, const PrepareShape& shape, int n_groups) {
  tokens.row_count = token_row_count(shape);
  tokens.rows = carver.take<uint8_t>(size_t(token_chunks(shape)) * tokens.row_count * kChunkBytes);
  tokens.scale = carver.take<float>(shape.m);
  tokens.zero = carver.take<int32_t>(shape.m);
  tokens.sum_pitch = shape.m;
  tokens.sums = n_groups ? carver.take<int32_t>(size_t(n_groups) * shape.m) : nullptr;
}

// Counters and partial sums for any shares of K that may be asked for,
// whatever the number of tokens.
inline void carve_partials(Carver& carver, GemmArgs& p, const Plan& plan) {
  const size_t blocks = plan.most_shares > 1 ? plan.most_split_blocks() : 0;
  p.tokens.counters = carver.take<int32_t>(blocks);
  p.partials = carver.take<int32_t>(blocks * plan.tile.outputs_per_thread() * plan.tile.threads());
}

#ifdef __CUDACC__
inline cudaError_t query_device(Device& device) {
  int ordinal = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&ordinal);
  const auto read = [&](int& value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, ordinal);
  };
  read(major, cudaDevAttrComputeCapabilityMajor);
  read(minor, cudaDevAttrComputeCapabilityMinor);
  read(device.multiprocessors, cudaDevAttrMultiProcessorCount);
  read(device.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  read(device.shared_per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  device.sm = 10 * major + minor;
  return error;
}
#else
// few multiprocessors, so that small shapes are not split to pieces
inline Device sim_device{90, 4, 227 << 10, 228 << 10};
inline cudaError_t query_device(Device& device) {
  device = sim_device;
  return cudaSuccess;
}
#endif

// What differs between the ops.
struct KernelTable {
  const char* op;
  int count;
  const char* (*name)(int kernel);
  bool (*supported)(const GemmShape& shape);
  Planner plan;
  int (*choose)(const GemmShape& shape, const Device& device);
  size_t (*workspace)(int kernel, const GemmShape& shape);                 // the same for every GPU
  bool (*has_inputs)(const GemmShape& shape, const GemmBuffers& buffers);  // weights, not x
  cudaError_t (*run)(Config config, const GemmShape& shape, const GemmBuffers& buffers,
                     const Device& device, cudaStream_t stream);
};

// The kernel and shares for a shape without a tactic: what was measured, else the op's rule.
inline Config default_config(const KernelTable& table, const GemmShape& s, const Device& device) {
  if (const Measured* row = find_measured(kMeasured, table.op, s, device)) {
    for (int kernel = 0; kernel < table.count; ++kernel) {
      const Plan plan = table.plan(kernel, s, device);
      if (plan.runs && std::strcmp(table.name(kernel), row->kernel) == 0)
        return {kernel, limited_shares(plan, row->shares, s)};
    }
  }
  const int kernel = table.choose(s, device);
  return filling_config(kernel, table.plan(kernel, s, device), s, device);
}

// The shape's tactic with its plan, or the default choice. A tactic's shares are an upper limit:
// fewer tokens may allow fewer.
inline cudaError_t config_of(const KernelTable& table, const GemmShape& s, const Device& device,
                             Config& config) {
  if (!s.tactic) {
    config = default_config(table, s, device);
    return cudaSuccess;
  }
  config = config_from_tactic(s.tactic);
  if (config.kernel < 0 || config.kernel >= table.count || config.shares < 1)
    return cudaErrorInvalidValue;
  const Plan plan = table.plan(config.kernel, s, device);
  if (!plan.runs) return cudaErrorInvalidValue;
  config.shares = limited_shares(plan, config.shares, s);
  return cudaSuccess;
}

// AnybitOp::tactics
inline int list_tactics(const KernelTable& table, const GemmShape* shape, int32_t* tactics,
                        int capacity) {
  Device device;
  if (!table.supported(*shape) || query_device(device) != cudaSuccess) return 0;
  int count = 0;
  const auto add = [&](Config config) {
    if (count < capacity) tactics[count] = tactic_from_config(config);
    ++count;
  };
  const Config chosen = default_config(table, *shape, device);
  add(chosen);
  for (int kernel = 0; kernel < table.count; ++kernel) {
    const Plan plan = table.plan(kernel, *shape, device);
    if (plan.runs && kernel != chosen.kernel) add(filling_config(kernel, plan, *shape, device));
  }
  return count;
}

// AnybitOp::kernel
inline const char* kernel_name(const KernelTable& table, int32_t tactic) {
  const int kernel = config_from_tactic(tactic).kernel;
  return tactic > 0 && kernel >= 0 && kernel < table.count ? table.name(kernel) : "?";
}

// AnybitOp::workspace
inline size_t workspace_bytes(const KernelTable& table, const GemmShape* shape) {
  if (!table.supported(*shape)) return 0;
  Device device;
  Config config;
  if (shape->tactic != kAnyTactic && query_device(device) == cudaSuccess) {
    return config_of(table, *shape, device, config) == cudaSuccess
               ? table.workspace(config.kernel, *shape)
               : 0;
  }
  size_t most = 0;  // for any tactic; or a choice that a GPU must make that is not here
  for (int kernel = 0; kernel < table.count; ++kernel) {
    const size_t bytes = table.workspace(kernel, *shape);
    most = bytes > most ? bytes : most;
  }
  return most;
}

inline bool has_norm(const GemmShape& s) { return s.norm_epsilon > 0; }

// AnybitOp::run
inline cudaError_t run_op(const KernelTable& table, const GemmShape& s, const GemmBuffers& buffers,
                          cudaStream_t stream) {
  if (!table.supported(s)) return cudaErrorInvalidValue;
  if (s.m == 0) return cudaSuccess;
  if (!buffers.x || !buffers.y || !table.has_inputs(s, buffers)) return cudaErrorInvalidValue;
  if (has_norm(s) && !buffers.gamma) return cudaErrorInvalidValue;
  Device device;
  Config config;
  cudaError_t error = query_device(device);
  if (error == cudaSuccess) error = config_of(table, s, device, config);
  if (error != cudaSuccess) return error;
  if (!buffers.workspace && table.workspace(config.kernel, s)) return cudaErrorInvalidValue;
  return table.run(config, s, buffers, device, stream);
}

// A table as the C interface shows it.
template <const KernelTable& kTable>
AnybitOp op_from_table() {
  AnybitOp op = {};
  op.name = kTable.op;
  op.workspace = [](const GemmShape* shape) { return workspace_bytes(kTable, shape); };
  op.tactics = [](const GemmShape* shape, int32_t* tactics, int capacity) {
    return list_tactics(kTable, shape, tactics, capacity);
  };
  op.kernel = [](int32_t tactic) { return kernel_name(kTable, tactic); };
  op.run = [](const GemmShape* shape, const GemmBuffers* buffers, void* cuda_stream) {
    return int(run_op(kTable, *shape, *buffers, static_cast<cudaStream_t>(cuda_stream)));
  };
  return op;
}

// f(std::integral_constant<int, index>()) for a run-time index below kCount.
template <int kCount, int kFirst = 0, class F>
auto with_index(int index, F&& f) {
  if constexpr (kFirst + 1 < kCount) {
    if (index != kFirst) return with_index<kCount, kFirst + 1>(index, std::forward<F>(f));
  }
  return f(std::integral_constant<int, kFirst>());
}

// How a GEMM is started.
struct Split {
  int shares;  // of K
  const Device& device;
  cudaStream_t stream;
};

// Start a kernel of this tile over all tiles of p.
template <class Shape, class Args>
cudaError_t launch_tiles(void (*kernel)(Args), int threads, size_t shared_bytes, const Args& p,
                         const Split& split) {
  LaunchShape shape;
  shape.grid = dim3(ceil_div(p.n, Shape::kRows),
                    ceil_div(p.m * p.columns_per_token, Shape::kTokens), split.shares);
  shape.block = dim3(threads);
  shape.shared_bytes = shared_bytes;
  shape.overlap = split.device.sm >= 90 && waits_for_earlier_launch(kernel);
  return launch(shape, split.stream, kernel, p);
}
template <class Op>
cudaError_t launch_gemm(const typename Op::Args& p, const Split& split) {
  return launch_tiles<typename Op::Shape>(gemm<Op>, Op::Shape::kThreads, gemm_shared_bytes<Op>(), p,
                                          split);
}
template <class Op>
cudaError_t launch_warpgroups(const typename Op::Args& p, const Split& split) {
  const int threads = Op::Shape::kThreads + kCopyingThreads;
  return launch_tiles<typename Op::Shape>(gemm_warpgroups<Op>, threads,
                                          warpgroup_shared_bytes<Op>(), p, split);
}

}  // namespace anybit

#ifndef __CUDACC__
// The simulation's GPU, for the choice of kernels.
ANYBIT_API inline __attribute__((used)) void anybit_sim_set_device(int sm, int multiprocessors,
                                                                   int shared_per_block) {
  anybit::sim_device = {sm, multiprocessors, shared_per_block, shared_per_block + 1024};
}
#endif
