// QQQGemm on the int8 tensor cores of compute capability 9.0 (wgmma): packed words become operand A
// in registers, as in int8.cuh.
#pragma once
#include "core/device/warpgroup.cuh"
#include "qqq_gemm/cuda/int8.cuh"

namespace anybit {

// A column block of 64 rows is 4 m16 tiles; a warp takes kRowTiles (2) of them, one word each of
// the 16 bytes that a lane has there. Which rows make up a tile of wgmma is free, as A comes
// from registers: lanes 8 to 15 and 24 to 31 of two warps swap their pairs of tiles, so that 16
// lanes read from all banks.
template <class Weights, class Shape_>
struct QqqWarpgroup {
  using Args = QqqGemmArgs;
  using Shape = Shape_;
  static constexpr int kTiles = Shape::kRowTiles;
  static constexpr int kTokenTiles = Shape::kTokenTiles;
  static constexpr int kChunks = Shape::kChunks;
  static constexpr int kBlocks = Shape::kRows / kBlockRows;
  // [chunk][packed row][column block][kBlockBytes]
  static constexpr int kWeightBytes = kChunks * kChunkRows * kBlocks * kBlockBytes;
  static constexpr int kSlotBytes = kWeightBytes + kChunks * Shape::kTokens * kChunkBytes;
  static_assert(kTiles == 2, "words are read in pairs");

  const Args& p;
  // this lane's first
  const int lane = threadIdx.x % 32;
  const int tile = threadIdx.x / 64 * 4 + (threadIdx.x / 32 % 2 ^ lane / 8 % 2) * kTiles;
  const int n0 = blockIdx.x * Shape::kRows;
  int32_t product[kTiles][kTokenTiles][4] = {};
  GroupScales<2, kTiles> scales;

  __device__ explicit QqqWarpgroup(const Args& args) : p(args) {}

  // Packed rows and column blocks that there are; what is left out of a slot meets codes
  // that are 0, or is not stored.
  class Copies {
   public:
    __device__ Copies(const Args& p, int thread, int first)
        : copies_(thread == 0),
          row_words_(size_t(p.blocks) * kBlockWords),
          rows_(p.packed_rows - first * kChunks * kChunkRows),
          announced_(rows_),
          tokens_(p, first * kChunks, p.chunks) {
      const int blocks = p.blocks - int(blockIdx.x) * kBlocks;
      row_bytes_ = (blocks < kBlocks ? blocks : kBlocks) * kBlockBytes;
      from_ = p.weight + first * kChunks * kChunkRows * row_words_ +
              size_t(blockIdx.x) * kBlocks * kBlockWords;
    }
    __device__ void load_weights(char* slot, uint64_t* barrier) {
      if (!copies_) return;
      ANYBIT_ROLLED
      for (int i = 0; i < kChunks * kChunkRows && i < rows_; ++i, from_ += row_words_)
        copy_bulk(slot + i * kBlocks * kBlockBytes, from_, row_bytes_, barrier);
      rows_ -= kChunks * kChunkRows;
    }
    __device__ void load_tokens(char* slot, uint64_t* barrier) {
      tokens_.load(
          slot + kWeightBytes,
          (announced_ < kChunks * kChunkRows ? announced_ : kChunks * kChunkRows) * row_bytes_,
          barrier);
      announced_ -= kChunks * kChunkRows;
    }

   private:
    const bool copies_;
    const size_t row_words_;
    int rows_, announced_, row_bytes_;  // rows from the next stage on to copy, and to announce
    const uint32_t* from_;
    BulkTokenCopies<kChunks, Shape> tokens_;
  };

  __device__ void begin(int stage) {
    if constexpr (Weights::kGrouped) scales.start(p, stage * kChunks, 0, n0 + 16 * tile);
  }

  // a[step][tile]: the fragments of a chunk.
  template <bool kLimit>
  __device__ void load_fragments(uint32_t (&a)[kChunkSteps][kTiles][4], const char* slot, int c,
                                 const uint32_t (&scale)[2][kTiles][2]) const {
    ANYBIT_UNROLL
    for (int row = 0; row < 2 * kChunkSteps; ++row) {  // packed
      const char* from = slot + ((c * kChunkRows + row) * kBlocks + tile / 4) * kBlockBytes +
                         lane * 16 + tile % 4 * 4;
      const uint2 words = *reinterpret_cast<const uint2*>(from);
      ANYBIT_UNROLL
      for (int j = 0; j < kTiles; ++j) {
        const int step = row / 2, upper = row % 2;
        const uint32_t word = j ? words.y : words.x;
        if constexpr (Weights::kGrouped)
          Weights::template expand<kLimit>(word, scale[step / 2][j], a[step][j][2 * upper],
                                           a[step][j][2 * upper + 1]);
        else Weights::expand(word, a[step][j][2 * upper], a[step][j][2 * upper + 1]);
      }
    }
  }

  __device__ void multiply_chunk(const char* slot, int c) {
    uint32_t a[kChunkSteps][kTiles][4], scale[2][kTiles][2];
    bool limit = false;
    if constexpr (Weights::kGrouped) {
      limit = scales.take(scale);
      scales.load(p);
    }
    if (limit) load_fragments<true>(a, slot, c, scale);
    else load_fragments<false>(a, slot, c, scale);
    multiply_fragments<false>(product, a, slot + kWeightBytes + c * Shape::kTokens * kChunkBytes);
  }

  __device__ void multiply(const char* slot, int stage) {
    ANYBIT_ROLLED
    for (int c = 0; c < kChunks && stage * kChunks + c < p.chunks; ++c) multiply_chunk(slot, c);
  }

  __device__ void finish(char* shared) { store_products<Weights, Shape>(p, product, shared, tile); }
};

}  // namespace anybit
