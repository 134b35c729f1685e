// The frame of the fast GEMM kernels: a block multiplies kRows weight rows with kTokens
// tokens over its share of K.
//
// Weights are operand A of the tensor core (16 rows), tokens operand B (8 columns): with few
// tokens nothing is wasted. Both come through a ring of kStages slots of shared memory, filled
// by cp.async; Op::Copies says what a slot holds, Op what is done with it. Grid: x weight
// tiles, y token tiles, z shares of K. Blocks of one tile leave partial sums in the workspace;
// the last one to finish adds them up in order of z, so the result is the same every time.
// Nobody waits for another block.
#pragma once
#include "core/device/numeric.cuh"
#include "core/device/tiles.cuh"

namespace anybit {

struct GemmArgs {
  int m, n;
  int columns_per_token;  // rows of prepared tokens that one token has: 1, or its bit planes
  int stages;             // slots that all of K fills, one after the other
  Tokens tokens;
  const float* bias;  // [n] or null
  void* y;            // [m, n]
  int32_t dtype;      // DType of y
  void* partials;     // [tile][share of K][accumulator][thread] 32-bit words; unused with one share
};

// Warps along the weight rows, m16 tiles per warp, n8 tiles per warp, 128-k chunks per slot, slots.
template <int kWarps_, int kRowTiles_, int kTokenTiles_, int kChunks_, int kStages_>
struct TileShape {
  static constexpr int kWarps = kWarps_;
  static constexpr int kRowTiles = kRowTiles_;
  static constexpr int kTokenTiles = kTokenTiles_;
  static constexpr int kChunks = kChunks_;
  static constexpr int kStages = kStages_;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRows = 16 * kWarps * kRowTiles;
  static constexpr int kTokens = 8 * kTokenTiles;
  static constexpr int kPitch = kRows + 4;

  __device__ static void sync() { __syncthreads(); }  // of the kThreads that multiply
};

// Copies the rows of a tile, kTokens from a multiple of 8 on (where the swizzle starts over), to
// shared memory [chunk][row][128]: kChunks token chunks at a time, from `first` on and below `end`.
// Rows that no token has are left out: they are columns that are not stored.
template <int kChunks, class Shape>
class TokenCopies {
 public:
  __device__ TokenCopies(const GemmArgs& p, int thread, int first, int end)
      : chunk_bytes_(size_t(p.tokens.row_count) * kChunkBytes), to_(thread * 16) {
    const int first_row = blockIdx.y * Shape::kTokens;
    const int chunk = first + thread / kParts;
    const int part = thread % kParts;
    from_ = p.tokens.rows + token_offset(p.tokens.row_count, chunk, first_row, 0) + part * 16;
    rows_ = p.m * p.columns_per_token - first_row - part / 8;
    left_ = end - chunk;
  }
  __device__ void load(char* to) {
    ANYBIT_UNROLL
    // chunks and parts beyond this thread's first
    for (int i = 0; i < kChunks * kParts; i += Shape::kThreads) {
      const int c = i / kParts, part = i % kParts;
      if (c < left_ && part / 8 < rows_)
        copy_async16(to + to_ + i * 16, from_ + c * chunk_bytes_ + part * 16);
    }
    from_ += kChunks * chunk_bytes_, left_ -= kChunks;
  }

 private:
  static constexpr int kParts = Shape::kTokens * kChunkBytes / 16;  // of a chunk
  static_assert(kChunks * kParts % Shape::kThreads == 0, "as many parts for every thread");

  const size_t chunk_bytes_;
  const int to_;
  const uint8_t* from_;
  int rows_, left_;
};

// b[0..1], b[2..3]: the B fragments of k steps 2 * pair and 2 * pair + 1 of a chunk
// [token][128] for tokens 8 * tile.. .
__device__ inline void load_token_fragments(uint32_t (&b)[4], const char* chunk, int tile,
                                            int pair) {
  const int lane = threadIdx.x % 32, token = 8 * tile + lane % 8, part = 4 * pair + lane / 8;
  load_matrices(b, chunk + token * kChunkBytes + swizzled(part, lane % 8));
}

// Number `i` of a thread's accumulators, counted through all tiles.
template <class Value, int kRowTiles, int kTokenTiles>
__device__ Value& accumulator(Value (&acc)[kRowTiles][kTokenTiles][4], int i) {
  return acc[i / 4 / kTokenTiles][i / 4 % kTokenTiles][i % 4];
}

// Adds up the accumulators of all blocks of this tile, share by share; true for the one
// block that then holds the sum.
template <class Shape, class Value, int kRowTiles, int kTokenTiles>
__device__ bool sum_over_k(Value (&acc)[kRowTiles][kTokenTiles][4], const GemmArgs& p,
                           char* shared) {
  constexpr int kCount = kRowTiles * kTokenTiles * 4;
  constexpr int kThreads = Shape::kThreads;
  constexpr int kShareWords = kCount * kThreads;
  const int shares = gridDim.z;
  if (shares == 1) return true;
  const size_t tile = size_t(blockIdx.y) * gridDim.x + blockIdx.x;
  Value* partials = static_cast<Value*>(p.partials) + tile * shares * kShareWords + threadIdx.x;
  Value* mine = partials + size_t(blockIdx.z) * kShareWords;
  ANYBIT_UNROLL
  for (int i = 0; i < kCount; ++i) mine[i * kThreads] = accumulator(acc, i);
  __threadfence();
  Shape::sync();
  int* finished_sh = reinterpret_cast<int*>(shared);
  if (threadIdx.x == 0) *finished_sh = atomicAdd(p.tokens.counters + tile, 1);
  Shape::sync();
  const bool last = *finished_sh == shares - 1;
  Shape::sync();  // before `shared` is used again
  if (!last) return false;
  __threadfence();
  // So many shares are on their way together that few loads wait for each other, but no
  // accumulators have to leave their registers.
  constexpr int kAtOnce = kCount > 16 ? 1 : 16 / kCount, kTogether = kCount > 16 ? 16 : kCount;
  static_assert(kCount % kTogether == 0, "whole rounds");
  ANYBIT_ROLLED
  for (int z = 0; z < shares; z += kAtOnce) {
    ANYBIT_UNROLL
    for (int first = 0; first < kCount; first += kTogether) {
      Value part[kAtOnce][kTogether];
      // One loop over both: written as two, one in the other, nvcc spills registers.
      ANYBIT_UNROLL
      for (int i = 0; i < kAtOnce * kTogether; ++i) {
        const int share = i / kTogether, place = i % kTogether;
        if (z + share < shares)
          part[share][place] =
              __ldcg(partials + (size_t(z) + share) * kShareWords + (first + place) * kThreads);
      }
      ANYBIT_UNROLL
      for (int i = 0; i < kAtOnce * kTogether; ++i) {
        const int share = i / kTogether, place = i % kTogether;
        Value& sum = accumulator(acc, first + place);
        if (z + share < shares) sum = z + share ? sum + part[share][place] : part[share][place];
      }
    }
  }
  return true;
}

// f(y as what it points to).
template <class F>
__device__ void with_outputs(const GemmArgs& p, F f) {
  if (p.dtype == kFloat16) f(static_cast<__half*>(p.y));
  else if (p.dtype == kBFloat16) f(static_cast<__nv_bfloat16*>(p.y));
  else f(static_cast<float*>(p.y));
}

// One output; `bias` is the row's, 0 where there is none.
template <class T>
__device__ void store_output(const GemmArgs& p, float bias, T* to, float v) {
  store_saturated(to, p.bias ? __fadd_rn(v, bias) : v);  // + 0 would change -0
}

// Writes the block's outputs. of_row(n) reads what a weight row needs and gives value(accumulator,
// m), without the bias. The accumulators go through shared memory, so that a warp writes neighbours
// in n, a thread keeps to its row as long as it can, and the arithmetic is there once and not for
// each of a thread's accumulators. tile: the first of this lane's m16 tiles.
template <class Shape, class Value, class F>
__device__ void store_tile(const GemmArgs& p, char* shared,
                           const Value (&acc)[Shape::kRowTiles][Shape::kTokenTiles][4], int tile,
                           F of_row) {
  constexpr int kRows = Shape::kRows, kPitch = Shape::kPitch, kThreads = Shape::kThreads;
  constexpr int kTogether = kRows < kThreads ? kThreads / kRows : 1;  // threads that share a row
  static_assert(kRows % kThreads == 0 || kThreads % kRows == 0,
                "whole rows to a thread, or whole threads to a row");
  Value* staged = reinterpret_cast<Value*>(shared);  // [kTokens][kPitch]
  const int thread = threadIdx.x, lane = thread % 32;
  ANYBIT_UNROLL
  for (int r = 0; r < Shape::kRowTiles; ++r) {
    ANYBIT_UNROLL
    for (int t = 0; t < Shape::kTokenTiles; ++t) {
      ANYBIT_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int row = 16 * (tile + r) + lane / 4 + 8 * (i / 2);
        const int token = 8 * t + 2 * (lane % 4) + i % 2;
        staged[token * kPitch + row] = acc[r][t][i];
      }
    }
  }
  Shape::sync();
  const int m0 = blockIdx.y * Shape::kTokens;
  const int tokens = p.m - m0 < Shape::kTokens ? p.m - m0 : Shape::kTokens;
  with_outputs(p, [&](auto* y) {
    // values computed before the first is stored
    constexpr int kAll = Shape::kTokens / kTogether, kAtOnce = kAll < 8 ? kAll : 8;
    for (int row = thread % kRows; row < kRows; row += kThreads) {
      const int n = blockIdx.x * kRows + row, first = thread / kRows % kTogether;
      if (n >= p.n) return;
      const auto value = of_row(n);
      const float bias = p.bias ? p.bias[n] : 0.0f;
      auto* to = y + size_t(m0 + first) * p.n + n;
      ANYBIT_ROLLED
      for (int token = first; token < tokens; token += kAtOnce * kTogether) {
        float v[kAtOnce];
        ANYBIT_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
          const int t = token + i * kTogether < tokens ? token + i * kTogether : tokens - 1;
          v[i] = value(staged[t * kPitch + row], m0 + t);
        }
        ANYBIT_UNROLL
        for (int i = 0; i < kAtOnce; ++i, to += size_t(kTogether) * p.n)
          if (token + i * kTogether < tokens) store_output(p, bias, to, v[i]);
      }
    }
  });
}

// Bytes of shared memory: the ring, or the staged outputs if they are larger.
template <class Op>
constexpr size_t gemm_shared_bytes() {
  using Shape = typename Op::Shape;
  const size_t ring = size_t(Op::kSlotBytes) * Shape::kStages;
  const size_t staged = sizeof(float) * Shape::kTokens * Shape::kPitch;
  return ring > staged ? ring : staged;
}

// First stage of share z of K; its end is the next share's. At most 64 * 2^20.
__device__ inline int share_of_k(int stages, unsigned z) {
  return int(unsigned(stages) * z / gridDim.z);
}

// Op: Args (a GemmArgs with more), Shape, kSlotBytes, kBlocksPerSm; Op(args); begin(stage), which
// reads no tokens, multiply(slot, stage), finish(shared). Op::Copies(args, thread, first stage):
// load_weights(slot), load_tokens(slot), each of which fills the next stage into a slot.
template <class Op>
__global__ void __launch_bounds__(Op::Shape::kThreads, Op::kBlocksPerSm) gemm(typename Op::Args p) {
  constexpr int kStages = Op::Shape::kStages;
  char* ring = dynamic_shared<char>();
  const int first = share_of_k(p.stages, blockIdx.z), end = share_of_k(p.stages, blockIdx.z + 1);
  Op op(p);
  typename Op::Copies copies(p, threadIdx.x, first);
  op.begin(first);
  for (int i = 0; i < kStages - 1 && first + i < end; ++i)
    copies.load_weights(ring + i * Op::kSlotBytes);
  wait_for_earlier_launch();  // only weights are read before: they never change
  for (int i = 0; i < kStages - 1; ++i) {
    if (first + i < end) copies.load_tokens(ring + i * Op::kSlotBytes);
    commit_copies();
  }
  // of this stage, of the one before
  char *slot = ring, *left = ring + (kStages - 1) * Op::kSlotBytes;
  for (int s = first; s < end; ++s) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // the slot has arrived for all threads, and all have left the one before
    if (s + kStages - 1 < end) {
      copies.load_weights(left);
      copies.load_tokens(left);
    }
    commit_copies();
    op.multiply(slot, s);
    left = slot;
    slot = slot == ring + (kStages - 1) * Op::kSlotBytes ? ring : slot + Op::kSlotBytes;
  }
  wait_for_copies<0>();
  __syncthreads();  // the ring is free for the results
  op.finish(ring);
}

}  // namespace anybit
