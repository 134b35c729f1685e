// ABQGemm on the int8 tensor cores of compute capability 9.0 (wgmma): codes made of planes in
// registers are operand A, as in int8.cuh.
#pragma once
#include "abq_gemm/cuda/int8.cuh"
#include "core/device/warpgroup.cuh"

namespace anybit {

// kPlanes: 2, 4 or 8, of which p.planes are there. kGrouped: several scales per
// row, of multiples of 128 k.
template <int kPlanes, bool kGrouped, class Shape_>
struct AbqWarpgroup : AbqInt8<kPlanes, 4, kGrouped, Shape_> {
  using Shape = Shape_;
  using Base = AbqInt8<kPlanes, 4, kGrouped, Shape>;
  using Base::p, Base::product, Base::code_sum, Base::kRowTiles, Base::kChunks, Base::kWeightBytes;

  using Base::Base;

  class Copies {
   public:
    __device__ Copies(const AbqGemmArgs& p, int thread, int first)
        : weights_(p, thread, first), tokens_(p, first * kChunks, p.row_words / kChunkWords) {}
    __device__ void load_weights(char* slot, uint64_t*) { weights_.load_weights(slot); }
    __device__ void load_tokens(char* slot, uint64_t* barrier) {
      tokens_.load(slot + kWeightBytes, 0, barrier);
    }

   private:
    AbqCopies<kPlanes, Shape, kCopyingThreads> weights_;
    BulkTokenCopies<kChunks, Shape> tokens_;
  };

  // Q of this lane's codes, by dp4a: the tensor cores are what everything waits for here.
  __device__ void sum_codes(const uint32_t (&codes)[kRowTiles][2][8]) {
    ANYBIT_UNROLL
    for (int i = 0; i < kRowTiles * 16; ++i) {
      int32_t& sum = code_sum[i / 16][i / 8 % 2 * 2];
      sum = int32_t(__dp4a(codes[i / 16][i / 8 % 2][i % 8], 0x01010101u, unsigned(sum)));
    }
  }
  // Q of all four lanes of a row, where finish() and close_group() look for it.
  __device__ void share_code_sums() {
    if (!p.asymmetric) return;
    ANYBIT_UNROLL
    for (int r = 0; r < kRowTiles; ++r) {
      ANYBIT_UNROLL
      for (int i = 0; i < 4; i += 2) {
        int32_t sum = code_sum[r][i];
        sum += shuffle_xor(sum, 1);
        sum += shuffle_xor(sum, 2);
        code_sum[r][i] = code_sum[r][i + 1] = sum;
      }
    }
  }

  __device__ void multiply_chunk(const char* slot, int c) {
    uint32_t codes[kRowTiles][2][8], a[kChunkSteps][kRowTiles][4];
    this->load_codes(codes, slot, c, 0);
    if (p.asymmetric) sum_codes(codes);
    ANYBIT_UNROLL
    for (int i = 0; i < kChunkSteps * kRowTiles * 4; ++i) {
      const int step = i / 4 / kRowTiles, r = i / 4 % kRowTiles;
      a[step][r][i % 4] = this->fragment(codes[r], step).a[i % 4];
    }
    multiply_fragments<true>(product, a, slot + kWeightBytes + c * Shape::kTokens * kChunkBytes);
  }

  __device__ void multiply(const char* slot, int stage) {
    this->walk(
        stage, [&](int c, int) { multiply_chunk(slot, c); },
        [&] {
          share_code_sums();
          this->close_group();
        });
  }

  __device__ void finish(char* shared) {
    if (!kGrouped) share_code_sums();
    Base::finish(shared);
  }
};

}  // namespace anybit
