// The frame of the GEMM kernels for compute capability 9.0: four warps copy, groups of
// four warps multiply (wgmma).
//
// Tiles, slots, shares of K and results are those of pipeline.cuh. The copying warps fill a slot as
// soon as all multiplying warps have left it; no __syncthreads in the loop. Two mbarriers for each
// slot: `full` (weights and tokens are there) and `empty`. Tokens of a tile are one piece of memory
// for each chunk (tiles.cuh), so that one thread's bulk copies bring them. While one group of warps
// makes int8 codes of its weights, the tensor cores work for the other. Multiplying warps take over
// most registers of the copying ones.
#pragma once
#include "core/device/pipeline.cuh"
#include "core/device/ptx_sm90.cuh"

namespace anybit {

// 65536 registers for 384 threads
constexpr int kCopyingThreads = 128, kCopyingRegisters = 40, kMultiplyingRegisters = 232;

template <class Tile>
struct WarpgroupShape : Tile {
  static_assert(Tile::kThreads == 256 && Tile::kStages >= 2,
                "registers are shared out for two groups of four warps");
  static_assert(kCopyingRegisters * kCopyingThreads + kMultiplyingRegisters * 256 <=
                    168 * (kCopyingThreads + 256),
                "what a launch gives");
  __device__ static void sync() { sync_part<Tile::kThreads>(); }
};

// Bytes of shared memory: as in pipeline.cuh, and the barriers behind it.
template <class Op>
constexpr size_t warpgroup_shared_bytes() {
  constexpr size_t kBarriers = 2 * Op::Shape::kStages * sizeof(uint64_t);
  static_assert(Op::kSlotBytes % 1024 == 0 && Op::kWeightBytes % 1024 == 0,
                "the swizzle of wgmma starts over every 1024 bytes");
  static_assert(kBarriers <= kWarpgroupBarriers, "what Plan::shared_bytes has for the barriers");
  return gemm_shared_bytes<Op>() + kBarriers;
}

// Where in the ring of kStages slots a stage is, and the parity of that slot's phase.
template <int kStages>
struct RingPlace {
  int slot = 0;
  uint32_t parity = 0;

  __device__ void advance() {
    if (++slot == kStages) slot = 0, parity ^= 1;
  }
};

// As TokenCopies, by one thread's bulk copies, told to the barrier
// together with `more` other bytes.
template <int kChunks, class Shape>
class BulkTokenCopies {
 public:
  __device__ BulkTokenCopies(const GemmArgs& p, int first, int end)
      : chunk_bytes_(size_t(p.tokens.row_count) * kChunkBytes), left_(end - first) {
    const int first_row = blockIdx.y * Shape::kTokens;
    const int rows = p.m - first_row < Shape::kTokens ? p.m - first_row : Shape::kTokens;
    from_ = p.tokens.rows + token_offset(p.tokens.row_count, first, first_row, 0);
    bytes_ = rows * kChunkBytes;
  }
  __device__ void load(char* to, int more, uint64_t* barrier) {
    const int chunks = left_ < kChunks ? left_ : kChunks;
    arrive_and_expect(barrier, chunks * bytes_ + more);
    ANYBIT_UNROLL
    for (int c = 0; c < kChunks; ++c, from_ += chunk_bytes_)
      if (c < chunks) copy_bulk(to + c * Shape::kTokens * kChunkBytes, from_, bytes_, barrier);
    left_ -= kChunks;
  }

 private:
  const size_t chunk_bytes_;
  int left_, bytes_;  // chunks; bytes of a chunk
  const uint8_t* from_;
};

constexpr int kChunkSteps = 4;  // of 32 k in a chunk

// product[r] += rows of this lane's tile r times the tokens of a chunk [token][128], a[step][r]
// being the fragments; done when it returns.
template <bool kUnsigned, int kRowTiles, int kTokenTiles>
__device__ void multiply_fragments(int32_t (&product)[kRowTiles][kTokenTiles][4],
                                   const uint32_t (&a)[kChunkSteps][kRowTiles][4],
                                   const char* tokens) {
  const SwizzledRows rows(tokens);
  fence_products();
  ANYBIT_UNROLL
  for (int step = 0; step < kChunkSteps; ++step) {
    ANYBIT_UNROLL
    for (int r = 0; r < kRowTiles; ++r)
      wgmma<kUnsigned>(product[r], a[step][r], rows.part(32 * step), true);
  }
  commit_products();
  wait_for_products<0>();
  ANYBIT_UNROLL
  for (int r = 0; r < kRowTiles; ++r) settle_products(product[r]);
}

// The copying warps. Op::Copies(args, thread, first stage), each of whose functions fills
// the next stage into a slot: load_weights(slot, barrier) by all threads, with copy_async
// or, told to the barrier, copy_bulk; load_tokens(slot, barrier) by one, which announces all
// bulk copies of the stage.
template <class Op>
__device__ void copy_stages(const typename Op::Args& p, char* ring, uint64_t* full, uint64_t* empty,
                            int first, int end) {
  constexpr int kStages = Op::Shape::kStages;
  const int thread = threadIdx.x - Op::Shape::kThreads;
  const int ahead = end - first < kStages ? end : first + kStages;
  typename Op::Copies copies(p, thread, first);
  const auto load_weights = [&](int i) {
    copies.load_weights(ring + i * Op::kSlotBytes, full + i);
    arrive_after_copies(full + i);
  };
  const auto load_tokens = [&](int i) {
    if (thread == 0) copies.load_tokens(ring + i * Op::kSlotBytes, full + i);
  };
  for (int i = 0; i < ahead - first; ++i) load_weights(i);
  wait_for_earlier_launch();  // only weights are read before: they never change
  for (int i = 0; i < ahead - first; ++i) load_tokens(i);
  RingPlace<kStages> place;
  for (int s = ahead; s < end; ++s, place.advance()) {
    wait_for_phase(empty + place.slot, place.parity);
    load_weights(place.slot);
    load_tokens(place.slot);
  }
  commit_copies();
  wait_for_copies<0>();  // a thread stays until its copies have come
}

// As gemm() of pipeline.cuh, with Op::multiply() done with the slot when it returns, and Op::Copies
// as above. Only sm_90a code has it.
template <class Op>
__global__ void __launch_bounds__(Op::Shape::kThreads + kCopyingThreads, 1)
    gemm_warpgroups(typename Op::Args p) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kStages = Op::Shape::kStages, kThreads = Op::Shape::kThreads;
  char* ring = dynamic_shared<char>();
  uint64_t* full = reinterpret_cast<uint64_t*>(ring + gemm_shared_bytes<Op>());
  uint64_t* empty = full + kStages;
  const int first = share_of_k(p.stages, blockIdx.z), end = share_of_k(p.stages, blockIdx.z + 1);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      init_barrier(full + i, kCopyingThreads + 1);
      init_barrier(empty + i, kThreads / 32);
    }
    fence_barriers();
  }
  __syncthreads();
  if (threadIdx.x >= kThreads) {
    set_registers<false, kCopyingRegisters>();
    copy_stages<Op>(p, ring, full, empty, first, end);
    return;
  }
  set_registers<true, kMultiplyingRegisters>();
  Op op(p);
  op.begin(first);
  wait_for_earlier_launch();  // for the tokens' scales and zero points
  RingPlace<kStages> place;
  for (int s = first; s < end; ++s, place.advance()) {
    wait_for_phase(full + place.slot, place.parity);
    op.multiply(ring + place.slot * Op::kSlotBytes, s);
    fence_reads();
    __syncwarp();
    if (threadIdx.x % 32 == 0) arrive(empty + place.slot);
  }
  Op::Shape::sync();  // the ring is free for the results
  op.finish(ring);
#else
  __trap();  // the host chooses these kernels for 9.0 only
#endif
}

}  // namespace anybit
