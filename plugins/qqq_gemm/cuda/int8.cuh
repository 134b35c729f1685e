// QQQGemm on int8 tensor cores. The packed words are the A fragments of mma.m16n8k32, four
// bits where it wants eight.
//
// A chunk of 128 k of a 64-column block is 8 packed rows of 512 bytes. k step s takes rows 2s and
// 2s + 1, 16 bytes of each per lane: word j belongs to m16 tile j, and of its nibbles those with b
// = 0 are rows g of the tile, those with b = 1 rows g + 8 (kernel.cuh has the order), so that lower
// row, upper row make a[0], a[1] of row 2s and a[2], a[3] of row 2s + 1.
#pragma once
#include "core/device/pipeline.cuh"
#include "qqq_gemm/cuda/kernel.cuh"

namespace anybit {

struct QqqGemmArgs : GemmArgs {
  int chunks;                   // of 128 k
  int packed_rows, blocks;      // of the weight: k_pad / 16, n_pad / 64
  int group_size;               // 0 = per channel
  const uint32_t* weight;       // [packed_rows, blocks, 128]
  const float* scale;           // [n]
  const uint16_t* scale_group;  // fp16 [k / group_size, n] or null
};

// Per channel: 16 * q as int8, because the nibble of row g is the high half of its byte. 3
// instructions for 8 weights.
struct ChannelWeights {
  static constexpr bool kGrouped = false;
  __device__ static void expand(uint32_t word, uint32_t& lower, uint32_t& upper) {
    lower = word & 0xf0f0f0f0u;
    upper = word << 4 & 0xf0f0f0f0u;
  }
};

// Per group: clamp(rint(q * scale), -127, 127). An fp16 of 1024 + q is put together from the
// nibble; (q * scale) + 1536 rounded to fp16 is a whole number, half to even as 1536 is even, whose
// low byte is the int8 weight. 15 instructions for 8 weights. Where |scale| > 127 / 8 (kLimit) the
// sum is limited to 1536 +- 127 as well: fp16 keeps whole numbers apart from 1024 to 2048, what
// lies outside (infinities too) is outside the limits. One lane holds rows g (lower) and g + 8
// (upper) of a tile, each with its own scale.
struct GroupWeights {
  static constexpr bool kGrouped = true;

  // Of a scale, as bits of an fp16 number.
  __device__ static bool needs_limits(uint32_t scale) { return (scale & 0x7fff) > kMostScale; }

  template <bool kLimit>
  __device__ static uint32_t four(uint32_t nibbles, uint32_t scale) {
    // 1024 + q of k 4q, 4q + 1, and 1024 + 16 q of the next two
    uint32_t first = masked_or(nibbles, 0x000f000fu, 0x64006400u);
    uint32_t last = masked_or(nibbles, 0x00f000f0u, 0x64006400u);
    first = half2_fma(first, kOne, kMinus1032);
    last = half2_fma(last, kSixteenth, kMinus72);
    first = half2_fma(first, scale, k1536);
    last = half2_fma(last, scale, k1536);
    if (kLimit) {
      first = half2_limited(first, k1409, k1663);
      last = half2_limited(last, k1409, k1663);
    }
    return __byte_perm(first, last, 0x6420);
  }
  template <bool kLimit>
  __device__ static void expand(uint32_t word, const uint32_t (&scale)[2], uint32_t& lower,
                                uint32_t& upper) {
    lower = four<kLimit>(word, scale[0]);
    upper = four<kLimit>(word >> 8, scale[1]);
  }

 private:
  static constexpr uint32_t kMostScale = 0x4bf0;  // 127 / 8, bits of the fp16 number
  // Pairs of fp16 constants.
  static constexpr uint32_t kOne = 0x3c003c00;
  static constexpr uint32_t kMinus1032 = 0xe408e408;
  static constexpr uint32_t kSixteenth = 0x2c002c00;
  static constexpr uint32_t kMinus72 = 0xd480d480;
  static constexpr uint32_t k1536 = 0x66006600, k1409 = 0x65816581, k1663 = 0x667f667f;
};

// Scales of a lane's rows (g and g + 8 of kTiles m16 tiles from row n0 on) for kHalves halves of
// one chunk after the other, the first of which is half `half`; fetched a chunk ahead. What lies
// past the end repeats the last group or row.
template <int kHalves, int kTiles>
class GroupScales {
 public:
  __device__ void start(const QqqGemmArgs& p, int chunk, int half, int n0) {
    const int last = p.packed_rows * kPackedRowK / p.group_size - 1;
    const int wanted = (kChunkK * chunk + kChunkK / 2 * half) / p.group_size;
    const int group = wanted < last ? wanted : last;
    from_ = p.scale_group + size_t(group) * p.n;
    left_ = last - group;
    first_row_ = n0 + int(threadIdx.x) % 32 / 4;
    last_row_ = p.n - 1;
    load(p);
  }

  // Of the next chunk.
  __device__ void load(const QqqGemmArgs& p) {
    const uint16_t* from = from_;
    ANYBIT_UNROLL
    for (int h = 0; h < kHalves; ++h) {
      ANYBIT_UNROLL
      for (int j = 0; j < kTiles; ++j) {
        ANYBIT_UNROLL
        for (int b = 0; b < 2; ++b) {
          next_[h][j][b] = from[row_of(j, b)];
        }
      }
      if (groups_of_chunk(p) == 2 && left_ > h) from += p.n;
    }
    const int passed = left_ < groups_of_chunk(p) ? left_ : groups_of_chunk(p);
    from_ += passed * size_t(p.n);
    left_ -= passed;
  }

  // What load() has fetched, each number twice. True if a scale of the warp needs the limits: the
  // whole warp takes one way.
  __device__ bool take(uint32_t (&scale)[kHalves][kTiles][2]) const {
    bool limit = false;
    ANYBIT_UNROLL
    for (int h = 0; h < kHalves; ++h) {
      ANYBIT_UNROLL
      for (int j = 0; j < kTiles; ++j) {
        ANYBIT_UNROLL
        for (int b = 0; b < 2; ++b) {
          scale[h][j][b] = twice(next_[h][j][b]);
          limit |= GroupWeights::needs_limits(next_[h][j][b]);
        }
      }
    }
    return ballot(limit) != 0;
  }

 private:
  // Groups have 64 or 128 k.
  __device__ static int groups_of_chunk(const QqqGemmArgs& p) {
    return p.group_size == kChunkK / 2 ? 2 : 1;
  }
  // Row g + 8 * b of tile j.
  __device__ unsigned row_of(int j, int b) const {
    const int n = first_row_ + 16 * j + 8 * b;
    return unsigned(n < last_row_ ? n : last_row_);
  }
  // An fp16 number in both halves of a register.
  __device__ static uint32_t twice(uint32_t half) { return half * 0x10001u; }

  uint32_t next_[kHalves][kTiles][2];
  // scales of the group that the next chunk begins with, and how many groups come after it
  const uint16_t* from_;
  int left_, first_row_, last_row_;
};

// Adds up the shares of K and writes the outputs.
template <class Weights, class Shape>
__device__ void store_products(const QqqGemmArgs& p,
                               int32_t (&acc)[Shape::kRowTiles][Shape::kTokenTiles][4],
                               char* shared, int tile) {
  if (!sum_over_k<Shape>(acc, p, shared)) return;
  store_tile<Shape>(p, shared, acc, tile, [&](int n) {
    return [&p, scale = p.scale[n]](int32_t v, int m) {
      const int32_t sum = Weights::kGrouped ? v : v >> 4;  // a multiple of 16
      return __fmul_rn(__fmul_rn(__int2float_rn(sum), scale), p.tokens.scale[m]);
    };
  });
}

// kSplitSteps: the block is one column block of 64 rows, and each of 4 warps takes one k
// step of every chunk; their sums meet in finish(). Otherwise each warp has a column block
// of its own and takes all steps.
template <class Weights, bool kSplitSteps, class Shape_>
struct QqqInt8 {
  using Args = QqqGemmArgs;
  using Shape = Shape_;
  // m16 tiles of a column block
  static constexpr int kTiles = 4, kTokenTiles = Shape::kTokenTiles, kChunks = Shape::kChunks;
  static constexpr int kBlocks = Shape::kRows / kBlockRows;
  // [chunk][packed row][column block][kBlockBytes]
  static constexpr int kWeightBytes = kChunks * kChunkRows * kBlocks * kBlockBytes;
  static constexpr int kSlotBytes = kWeightBytes + kChunks * Shape::kTokens * kChunkBytes;
  static constexpr int kBlocksPerSm = 1;
  static_assert(!kSplitSteps || kSlotBytes * Shape::kStages >= kTokenTiles * 8192,
                "sum_over_warps has 64 rows of 4 warps in the ring");
  static_assert(kSplitSteps ? Shape::kWarps == 4 && kBlocks == 1 : Shape::kWarps == kBlocks,
                "warps share K or the rows");

  const Args& p;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // this warp's, of the tile's column blocks
  const int block = kSplitSteps ? 0 : warp;
  const int n0 = blockIdx.x * Shape::kRows, m0 = blockIdx.y * Shape::kTokens;
  int32_t product[kTiles][kTokenTiles][4] = {};
  static constexpr int kHalves = kSplitSteps ? 1 : 2;  // of a chunk, that a warp takes
  GroupScales<kHalves, kTiles> scales;

  __device__ explicit QqqInt8(const Args& args) : p(args) {}

  // A thread copies one place of every kRowsAtOnce-th packed row.
  class Copies {
   public:
    __device__ Copies(const Args& p, int thread, int first)
        : step_(size_t(p.blocks) * kBlockWords * kRowsAtOnce),
          to_(thread * 16),
          tokens_(p, thread, first * kChunks, p.chunks) {
      const int row = first * kChunks * kChunkRows + thread / kParts;
      const int wanted = blockIdx.x * kBlocks + thread % kParts / 32;
      // past the last repeats it, and is not stored
      const int block = wanted < p.blocks ? wanted : p.blocks - 1;
      from_ = p.weight + (size_t(row) * p.blocks + block) * kBlockWords + thread % 32 * kLaneWords;
      rows_ = p.packed_rows - row;
    }
    // Rows past the end are left out: what the slot holds there meets codes that are 0.
    __device__ void load_weights(char* slot) {
      ANYBIT_UNROLL
      for (int i = 0; i < kChunks * kChunkRows; i += kRowsAtOnce, from_ += step_)
        if (i < rows_) copy_async16(slot + to_ + i * kBlocks * kBlockBytes, from_);
      rows_ -= kChunks * kChunkRows;
    }
    __device__ void load_tokens(char* slot) { tokens_.load(slot + kWeightBytes); }

   private:
    static constexpr int kParts = kBlocks * kBlockBytes / 16;  // of a packed row
    static constexpr int kRowsAtOnce = Shape::kThreads / kParts;
    static_assert(Shape::kThreads % kParts == 0 && kChunks * kChunkRows % kRowsAtOnce == 0,
                  "whole rows");

    const size_t step_;  // words from one row of this thread to the next
    const int to_;
    int rows_;  // from this thread's on
    const uint32_t* from_;
    TokenCopies<kChunks, Shape> tokens_;
  };

  __device__ void begin(int stage) {
    if constexpr (Weights::kGrouped)
      scales.start(p, stage * kChunks, kSplitSteps ? warp / 2 : 0, n0 + kBlockRows * block);
  }

  // b of k step `step` for two token tiles, 8 * t and 8 * (t + 1); with one tile the
  // second is the first again.
  __device__ void load_step(uint32_t (&b)[4], const char* tokens, int t, int step) const {
    const int matrix = lane / 8;
    const int token = 8 * (t + (kTokenTiles > 1 ? matrix / 2 : 0)) + lane % 8;
    const int part = 2 * step + matrix % 2;
    load_matrices(b, tokens + token * kChunkBytes + swizzled(part, lane % 8));
  }

  // This lane's words of a packed row of the slot, in this warp's column block.
  __device__ uint4 lane_words(const char* slot, int row) const {
    const char* from = slot + (row * kBlocks + block) * kBlockBytes + lane * 16;
    return *reinterpret_cast<const uint4*>(from);
  }

  template <class Expand>
  __device__ void multiply_step(const char* slot, int c, int step, Expand expand) {
    uint32_t a[kTiles][4];
    ANYBIT_UNROLL
    for (int upper = 0; upper < 2; ++upper) {
      const uint4 words = lane_words(slot, c * kChunkRows + 2 * step + upper);
      const uint32_t word[4] = {words.x, words.y, words.z, words.w};
      ANYBIT_UNROLL
      for (int j = 0; j < kTiles; ++j) expand(j, word[j], a[j][2 * upper], a[j][2 * upper + 1]);
    }
    const char* tokens = slot + kWeightBytes + c * Shape::kTokens * kChunkBytes;
    ANYBIT_UNROLL
    for (int t = 0; t < kTokenTiles; t += 2) {
      uint32_t b[4];
      load_step(b, tokens, t, step);
      ANYBIT_UNROLL
      for (int i = 0; i < 2 && t + i < kTokenTiles; ++i) {
        const uint32_t b_step[2] = {b[2 * i], b[2 * i + 1]};
        ANYBIT_UNROLL
        for (int j = 0; j < kTiles; ++j) mma_s8_s8(product[j][t + i], a[j], b_step);
      }
    }
  }

  // The steps of half a chunk, which has one group: all its 64 k, or this warp's 32 of them.
  template <bool kLimit>
  __device__ void multiply_half(const char* slot, int c, int half,
                                const uint32_t (&scale)[kTiles][2]) {
    const int first = kSplitSteps ? warp : 2 * half, count = kSplitSteps ? 1 : 2;
    ANYBIT_ROLLED
    for (int step = first; step < first + count; ++step)
      multiply_step(slot, c, step, [&](int j, uint32_t word, uint32_t& lower, uint32_t& upper) {
        if constexpr (Weights::kGrouped)
          Weights::template expand<kLimit>(word, scale[j], lower, upper);
        else Weights::expand(word, lower, upper);
      });
  }

  __device__ void multiply_chunk(const char* slot, int c) {
    uint32_t scale[kHalves][kTiles][2];  // each number twice
    bool limit = false;
    if constexpr (Weights::kGrouped) {
      limit = scales.take(scale);
      scales.load(p);
    }
    ANYBIT_UNROLL
    for (int half = 0; half < kHalves; ++half) {
      if (limit) multiply_half<true>(slot, c, half, scale[half]);
      else multiply_half<false>(slot, c, half, scale[half]);
    }
  }

  __device__ void multiply(const char* slot, int stage) {
    if constexpr (Weights::kGrouped) {
      ANYBIT_ROLLED
      for (int c = 0; c < kChunks && stage * kChunks + c < p.chunks; ++c) multiply_chunk(slot, c);
    } else {
      ANYBIT_UNROLL
      for (int c = 0; c < kChunks; ++c)
        if (stage * kChunks + c < p.chunks) multiply_chunk(slot, c);
    }
  }

  // Where sum_over_warps() puts a number of this lane: [tile][warp][t][i][lane].
  __device__ int sum_place(int tile, int of_warp, int t, int i) const {
    return (((tile * 4 + of_warp) * kTokenTiles + t) * 4 + i) * 32 + lane;
  }

  // Warp w gets tile w of the column block, summed over the warps' k steps.
  __device__ void sum_over_warps(int32_t (&acc)[1][kTokenTiles][4], int32_t* shared) const {
    ANYBIT_UNROLL
    for (int j = 0; j < kTiles; ++j) {
      ANYBIT_UNROLL
      for (int t = 0; t < kTokenTiles; ++t) {
        ANYBIT_UNROLL
        for (int i = 0; i < 4; ++i) shared[sum_place(j, warp, t, i)] = product[j][t][i];
      }
    }
    __syncthreads();
    ANYBIT_UNROLL
    for (int t = 0; t < kTokenTiles; ++t) {
      ANYBIT_UNROLL
      for (int i = 0; i < 4; ++i) {
        int32_t sum = 0;
        ANYBIT_UNROLL
        for (int w = 0; w < 4; ++w) sum += shared[sum_place(warp, w, t, i)];
        acc[0][t][i] = sum;
      }
    }
    __syncthreads();
  }

  __device__ void finish(char* shared) {
    if constexpr (kSplitSteps) {
      int32_t acc[1][kTokenTiles][4];
      sum_over_warps(acc, reinterpret_cast<int32_t*>(shared));
      store_products<Weights, Shape>(p, acc, shared, warp);
    } else {
      store_products<Weights, Shape>(p, product, shared, warp * kTiles);
    }
  }
};

}  // namespace anybit
