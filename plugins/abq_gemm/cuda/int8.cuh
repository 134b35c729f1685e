// ABQGemm on int8 tensor cores: codes of any bits are put together from their planes
// in registers (planes.cuh).
//
// With P = sum a q, Q = sum q and S = sum (a - z) over a group, token zero point z
// and weight zero point zero:
//   D = sum (a - z)(q - zero) = (P - z * Q) - zero * S            exact
// With a minimum instead, a group is float(P - z * Q) * scale + float(S) * minimum.
// P comes from the tensor core, S from the token kernel, Q from the tensor core too, with a
// fragment of ones as tokens.
#pragma once
#include "abq_gemm/cuda/weights.cuh"

namespace anybit {

// kPlanes: 2, 4 or 8, of which p.planes are there. kWords: unit of planes.cuh.
// kGrouped: several scales per row.
template <int kPlanes, int kWords, bool kGrouped, class Shape_>
struct AbqInt8 : AbqPlanes<kPlanes, kWords, kGrouped, Shape_> {
  using Args = AbqGemmArgs;
  using Shape = Shape_;
  using Base = AbqPlanes<kPlanes, kWords, kGrouped, Shape>;
  using Base::p, Base::terms, Base::group, Base::kRowTiles, Base::kChunks, Base::kWeightBytes;
  static constexpr int kTokenTiles = Shape::kTokenTiles;
  static constexpr int kSlotBytes = kWeightBytes + kChunks * Shape::kTokens * kChunkBytes;
  static constexpr int kBlocksPerSm = 1;
  using Acc = typename std::conditional<kGrouped, float, int32_t>::type;

  int32_t product[kRowTiles][kTokenTiles][4] = {};  // P of the current group
  int32_t code_sum[kRowTiles][4] = {};              // Q, the same in every column
  // grouped: sum of float(D) * scale; per channel: P - z * Q
  Acc acc[kRowTiles][kTokenTiles][4] = {};

  using Base::Base;

  using Copies = AbqTileCopies<kPlanes, Shape>;

  // A fragment of k step `step` of a unit from the codes of rows g and g + 8.
  struct Fragment {
    uint32_t a[4];
  };
  __device__ static Fragment fragment(const uint32_t (&codes)[2][8], int step) {
    return {
        {codes[0][2 * step], codes[1][2 * step], codes[0][2 * step + 1], codes[1][2 * step + 1]}};
  }

  // End of a group: its integers become one fp32 term of every output.
  __device__ void close_group() {
    bool far = false;
    ANYBIT_UNROLL
    for (int r = 0; r < kRowTiles; ++r) {
      ANYBIT_UNROLL
      for (int half = 0; half < 2; ++half)
        far |= terms.zero[r][half] > p.zero_limit || terms.zero[r][half] < -p.zero_limit;
    }
    if (p.minimum) {
      add_terms([](int32_t centred, float scale, int32_t minimum, int32_t sum) {
        return Base::term_with_minimum(centred, scale, sum, __uint_as_float(uint32_t(minimum)));
      });
    } else if (ballot(far)) {
      add_terms([](int32_t centred, float scale, int32_t zero, int32_t sum) {
        return __fmul_rn(__ll2float_rn(centred - int64_t{zero} * sum), scale);
      });
    } else {
      add_terms([](int32_t centred, float scale, int32_t zero, int32_t sum) {
        return __fmul_rn(__int2float_rn(centred - zero * sum), scale);
      });
    }
    ANYBIT_UNROLL
    for (int r = 0; r < kRowTiles; ++r) {
      ANYBIT_UNROLL
      for (int i = 0; i < 4; ++i) code_sum[r][i] = 0;
    }
  }

  // term(P - z * Q, scale, zero, S): of a group.
  template <class Term>
  __device__ void add_terms(Term term) {
    ANYBIT_UNROLL
    for (int t = 0; t < kTokenTiles; ++t) {
      int32_t sum[2], z[2];
      ANYBIT_UNROLL
      for (int i = 0; i < 2; ++i) {
        sum[i] = p.tokens.sums[size_t(group) * p.tokens.sum_pitch + this->token_of(t, i)];
        z[i] = p.asymmetric ? p.tokens.zero[this->token_of(t, i)] : 0;
      }
      ANYBIT_UNROLL
      for (int r = 0; r < kRowTiles; ++r) {
        ANYBIT_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int32_t centred = product[r][t][i] - z[i % 2] * code_sum[r][i];
          acc[r][t][i] = __fadd_rn(
              acc[r][t][i], term(centred, terms.scale[r][i / 2], terms.zero[r][i / 2], sum[i % 2]));
          product[r][t][i] = 0;
        }
      }
    }
  }

  __device__ void sum_codes(const uint32_t (&codes)[kRowTiles][2][8]) {
    const uint32_t ones[2] = {0x01010101u, 0x01010101u};
    ANYBIT_UNROLL
    for (int r = 0; r < kRowTiles; ++r) {
      ANYBIT_UNROLL
      for (int step = 0; step < kWords; ++step)
        mma_u8_s8(code_sum[r], fragment(codes[r], step).a, ones);
    }
  }

  // k steps come in pairs, which share the registers of load_token_fragments(); a unit of one word
  // is half a pair.
  static constexpr int kPairs = (kWords + 1) / 2, kStepsOfPair = kWords == 1 ? 1 : 2;
  __device__ static int first_pair(int unit) { return unit * kWords / 2; }
  __device__ static bool is_upper_step(int unit, int step) { return kWords == 1 ? unit % 2 : step; }

  __device__ void multiply_unit(const char* slot, const char* tokens, int c, int unit) {
    uint32_t codes[kRowTiles][2][8];
    this->load_codes(codes, slot, c, unit);
    if (p.asymmetric) sum_codes(codes);
    ANYBIT_UNROLL
    for (int t = 0; t < kTokenTiles; ++t) {
      ANYBIT_UNROLL
      for (int pair = 0; pair < kPairs; ++pair) {
        uint32_t b[4];
        load_token_fragments(b, tokens, t, first_pair(unit) + pair);
        ANYBIT_UNROLL
        for (int step = 0; step < kStepsOfPair; ++step) {
          const bool upper = is_upper_step(unit, step);
          const uint32_t b_step[2] = {upper ? b[2] : b[0], upper ? b[3] : b[1]};
          ANYBIT_UNROLL
          for (int r = 0; r < kRowTiles; ++r)
            mma_u8_s8(product[r][t], fragment(codes[r], 2 * pair + step).a, b_step);
        }
      }
    }
  }

  __device__ void multiply(const char* slot, int stage) {
    const auto multiply_at = [&](int c, int unit) {
      multiply_unit(slot, slot + kWeightBytes + c * Shape::kTokens * kChunkBytes, c, unit);
    };
    if constexpr (kGrouped) {
      this->walk(stage, multiply_at, [&] { close_group(); });
    } else {
      ANYBIT_UNROLL
      for (int c = 0; c < kChunks; ++c) multiply_at(c, 0);  // behind the row weights are 0
    }
  }

  __device__ void finish(char* shared) {
    if constexpr (!kGrouped) {
      ANYBIT_UNROLL
      for (int t = 0; t < kTokenTiles; ++t) {
        ANYBIT_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int32_t z = p.asymmetric ? p.tokens.zero[this->token_of(t, i)] : 0;
          ANYBIT_UNROLL
          for (int r = 0; r < kRowTiles; ++r) acc[r][t][i] = product[r][t][i] - z * code_sum[r][i];
        }
      }
    }
    if (!sum_over_k<Shape>(acc, p, shared)) return;
    store_tile<Shape>(p, shared, acc, this->warp * kRowTiles, [&](int n) {
      if constexpr (kGrouped)
        return [this](float v, int m) { return __fmul_rn(v, p.tokens.scale[m]); };
      else return this->outputs_of(n);
    });
  }
};

}  // namespace anybit
