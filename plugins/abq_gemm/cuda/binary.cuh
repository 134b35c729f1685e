// ABQGemm by counting bits on tensor cores, for few tokens: a plane of 16 weight rows against up to
// 8 planes of the tokens at a time.
//
// With one token of 8 bits its planes are the 8 columns of the mma, and no part of it is wasted;
// nothing is unpacked. Prepared tokens are bit planes, `stride` (2, 4 or 8) rows each. With c[j]
// the sums of weight plane j, column i being activation plane i,
//   P = sum_i (+-2^i) sum_j 2^j c[j][i]          the top plane of two's complement counts negative
// One scale per row only.
#pragma once
#include "abq_gemm/cuda/weights.cuh"

namespace anybit {

template <int kPlanes, class Shape_>
struct AbqBinary : AbqPlanes<kPlanes, 4, false, Shape_> {
  using Args = AbqGemmArgs;
  using Shape = Shape_;
  using Base = AbqPlanes<kPlanes, 4, false, Shape>;
  using Base::p, Base::q, Base::n0, Base::lane, Base::warp, Base::kChunks, Base::kWeightBytes;
  static constexpr int kTokenTiles = Shape::kTokenTiles;
  static constexpr int kSlotBytes = kWeightBytes + Shape::kTokens * kChunkBytes;
  // a chunk of tokens is kParts chunks of weights
  static constexpr int kBlocksPerSm = 1, kParts = kChunkBytes / 16;
  static_assert(Shape::kRowTiles == 1 && kParts % kChunks == 0,
                "a slot lies within a chunk of tokens");

  int32_t count[kPlanes][kTokenTiles][4] = {};
  int32_t code_sum[2] = {};  // of this lane's words of rows g and g + 8

  using Base::Base;

  class Copies : public AbqCopies<kPlanes, Shape> {
   public:
    __device__ Copies(const Args& args, int thread, int first)
        : AbqCopies<kPlanes, Shape>(args, thread, first), thread_(thread), stage_(first) {}
    // Only the parts of the slot, at their places in the chunk; rows that
    // no token has are left out.
    __device__ void load_tokens(char* slot) {
      const int stage = stage_++;
      constexpr int kChunks = Shape::kChunks, kAll = Shape::kTokens * kChunks;
      const AbqGemmArgs& p = this->p;
      const int first = stage * kChunks % kParts;
      const int chunk = stage * kChunks / kParts;
      const int row0 = blockIdx.y * Shape::kTokens;
      const uint8_t* from = p.tokens.rows + token_offset(p.tokens.row_count, chunk, row0, 0);
      ANYBIT_UNROLL
      for (int i = 0; i < kAll; i += Shape::kThreads) {
        const int at = i + thread_, row = at / kChunks;
        const size_t offset = token_offset(Shape::kTokens, 0, row, 16 * (first + at % kChunks));
        if (at < kAll && row < p.m * p.columns_per_token - row0)
          copy_async16(slot + kWeightBytes + offset, from + offset);
      }
    }

   private:
    const int thread_;
    int stage_;
  };

  // k256 step `step` of a slot: chunks 2 * step and 2 * step + 1.
  __device__ void multiply_step(const char* slot, int step, const uint32_t (&b)[kTokenTiles][2]) {
    const char* from = slot + Base::part_offset(16 * warp + lane % 16, 2 * step + lane / 16);
    ANYBIT_UNROLL
    for (int j = 0; j < kPlanes; ++j) {
      if (j >= p.planes) break;
      uint32_t a[4];
      load_matrices(a, from + j * Base::kPlaneBytes);
      ANYBIT_UNROLL
      for (int t = 0; t < kTokenTiles; ++t) mma_b1(count[j][t], a, b[t]);
      if (p.asymmetric) {
        code_sum[0] += (__popc(a[0]) + __popc(a[2])) << j;
        code_sum[1] += (__popc(a[1]) + __popc(a[3])) << j;
      }
    }
  }

  __device__ void multiply(const char* slot, int stage) {
    const int first_pair = stage * kChunks % kParts / 4;
    ANYBIT_ROLLED
    for (int pair = 0; pair < kChunks / 4; ++pair) {
      uint32_t b[2][kTokenTiles][2];
      ANYBIT_UNROLL
      for (int t = 0; t < kTokenTiles; ++t) {
        uint32_t both[4];
        load_token_fragments(both, slot + kWeightBytes, t, first_pair + pair);
        b[0][t][0] = both[0], b[0][t][1] = both[1], b[1][t][0] = both[2], b[1][t][1] = both[3];
      }
      multiply_step(slot, 2 * pair, b[0]);
      multiply_step(slot, 2 * pair + 1, b[1]);
    }
  }

  __device__ int32_t plane_weight(int plane) const {
    return plane >= p.abits ? 0 : plane == p.abits - 1 ? -(1 << plane) : 1 << plane;
  }

  // Token of the columns 8 * t + 2 * q, and whether this lane is the first
  // that has one of its planes.
  __device__ int token_of(int t) const {
    return (int(blockIdx.y) * Shape::kTokens + 8 * t + 2 * q) / p.columns_per_token;
  }
  __device__ bool leads() const { return 2 * q % p.columns_per_token == 0; }

  // acc[t][half] = P - z * Q of row g + 8 * half and token_of(t).
  __device__ void combine(int32_t (&acc)[1][kTokenTiles][4]) {
    ANYBIT_UNROLL
    for (int half = 0; half < 2; ++half)
      for (int lane_mask = 1; lane_mask < 4; lane_mask *= 2)
        code_sum[half] += shuffle_xor(code_sum[half], lane_mask);
    const int plane = 2 * q % p.columns_per_token;
    const int32_t weight[2] = {plane_weight(plane), plane_weight(plane + 1)};
    ANYBIT_UNROLL
    for (int t = 0; t < kTokenTiles; ++t) {
      const int m = token_of(t) < p.m ? token_of(t) : p.m - 1;
      const int32_t z = p.asymmetric ? p.tokens.zero[m] : 0;
      ANYBIT_UNROLL
      for (int half = 0; half < 2; ++half) {
        int32_t sum = 0;
        ANYBIT_UNROLL
        for (int j = 0; j < kPlanes; ++j)
          sum += (weight[0] * count[j][t][2 * half] + weight[1] * count[j][t][2 * half + 1]) << j;
        for (int lane_mask = 1; 2 * lane_mask < p.columns_per_token; lane_mask *= 2)
          sum += shuffle_xor(sum, lane_mask);
        acc[0][t][2 * half] = sum - z * code_sum[half];
        acc[0][t][2 * half + 1] = 0;
      }
    }
  }

  __device__ void finish(char* shared) {
    int32_t acc[1][kTokenTiles][4];
    combine(acc);
    if (!sum_over_k<Shape>(acc, p, shared)) return;
    ANYBIT_UNROLL
    for (int t = 0; t < kTokenTiles; ++t) {
      ANYBIT_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int n = n0 + 16 * warp + lane / 4 + 8 * half, m = token_of(t);
        if (!leads() || n >= p.n || m >= p.m) continue;
        const float v = this->outputs_of(n)(acc[0][t][2 * half], m);
        with_outputs(p, [&](auto* y) {
          store_output(p, p.bias ? p.bias[n] : 0.0f, y + size_t(m) * p.n + n, v);
        });
      }
    }
  }
};

}  // namespace anybit
