// ABQGemm with activations left in fp16 or bf16 ("A16"): codes from planes, made 16-bit numbers q
// - zero, fp32 accumulators.
//
// Two bytes of codes become two numbers of type T by putting them into the low bits of 1024 (fp16)
// or 128 (bf16) and subtracting 1024 + zero or 128 + zero, which is exact as long as zero is near
// the codes. A zero point that is not (it may be any int32) is left out, and sum(x) * zero
// subtracted from the sum of the group in fp32; sum(x) comes from the tensor core as well. A minimum
// is added in the same way.
#pragma once
#include "abq_gemm/cuda/weights.cuh"

namespace anybit {

// Numbers of type T from codes. kBytes: whether codes may have 8 bits.
template <class T, bool kBytes>
struct Numbers;

template <bool kBytes>
struct Numbers<__half, kBytes> {
  // 1024 + zero and all of q - zero are exact
  static constexpr int32_t kLeastZero = -1024, kMostZero = 1024;
  static constexpr uint32_t kOnes = 0x3c003c00;  // 1, twice
  uint32_t offset;                               // -(1024 + zero), twice

  __device__ explicit Numbers(int32_t zero)
      : offset(pair_of(__float2half_rn(-1024.0f - static_cast<float>(zero)))) {}
  // q - zero of bytes 2 * half and 2 * half + 1.
  __device__ uint32_t operator()(uint32_t codes, int half) const {
    return half2_fma(__byte_perm(codes, 0x64646464u, half ? 0x4342 : 0x4140), kOnes, offset);
  }
};

template <>
struct Numbers<__nv_bfloat16, false> {  // codes of up to 4 bits, though 7 would do
  static constexpr int32_t kLeastZero = -128, kMostZero = 128;
  static constexpr uint32_t kOnes = 0x3f803f80;
  uint32_t offset;  // -(128 + zero), twice

  __device__ explicit Numbers(int32_t zero)
      : offset(pair_of(__float2bfloat16_rn(-128.0f - static_cast<float>(zero)))) {}
  __device__ uint32_t operator()(uint32_t codes, int half) const {
    return bfloat2_fma(__byte_perm(codes, 0x43434343u, half ? 0x4342 : 0x4140), kOnes, offset);
  }
};

template <>
// 8 bits and a zero point among them: by way of fp32, 2^23 + q
struct Numbers<__nv_bfloat16, true> {
  static constexpr int32_t kLeastZero = 0, kMostZero = 256;
  static constexpr uint32_t kOnes = 0x3f803f80;
  float offset;

  __device__ explicit Numbers(int32_t zero) : offset(-8388608.0f - static_cast<float>(zero)) {}
  __device__ uint32_t operator()(uint32_t codes, int half) const {
    const float low = __uint_as_float(__byte_perm(codes, 0x4b000000u, half ? 0x7442 : 0x7440));
    const float high = __uint_as_float(__byte_perm(codes, 0x4b000000u, half ? 0x7443 : 0x7441));
    const uint32_t low_bits = __bfloat16_as_ushort(__float2bfloat16_rn(__fadd_rn(low, offset)));
    return low_bits | uint32_t(__bfloat16_as_ushort(__float2bfloat16_rn(__fadd_rn(high, offset))))
                          << 16;
  }
};

// T: of x; prepared tokens hold it in slot order, 64 values a chunk. The rest as in AbqInt8.
template <class T, int kPlanes, int kWords, bool kGrouped, class Shape_>
struct AbqWeightOnly : AbqPlanes<kPlanes, kWords, kGrouped, Shape_, kPlanes == 8 ? 5 : 1> {
  using Args = AbqGemmArgs;
  using Shape = Shape_;
  // 4 planes stand for 1 and 2 as well
  using Base = AbqPlanes<kPlanes, kWords, kGrouped, Shape, kPlanes == 8 ? 5 : 1>;
  using Base::p, Base::terms, Base::kRowTiles, Base::kChunks, Base::kWeightBytes;
  using Number = Numbers<T, (kPlanes > 4)>;
  static constexpr int kTokenTiles = Shape::kTokenTiles, kTokenBytes = Shape::kTokens * kChunkBytes;
  // 128 k are two chunks of tokens
  static constexpr int kSlotBytes = kWeightBytes + 2 * kChunks * kTokenBytes;
  static constexpr int kBlocksPerSm = 1;

  // of the current group: sum of x * (q - zero), or of x * q where zero is far
  float product[kRowTiles][kTokenTiles][4] = {};
  float total[kRowTiles][kTokenTiles][4] = {};
  // sum of x, only kept while some zero point of the warp is far or there is a minimum
  float x_sum[kTokenTiles][4] = {};
  bool needs_x_sum = false;

  using Base::Base;

  __device__ static bool far(int32_t zero) {
    return zero < Number::kLeastZero || zero > Number::kMostZero;
  }

  __device__ void begin(int stage) {
    if constexpr (kGrouped) {
      Base::begin(stage);
    } else {
      this->open_group(0);
      look_for_far_zeros();
    }
  }

  using Copies = AbqTileCopies<kPlanes, Shape, 2>;

  __device__ void look_for_far_zeros() {
    bool found = false;
    ANYBIT_UNROLL
    for (int r = 0; r < kRowTiles; ++r) found |= far(terms.zero[r][0]) || far(terms.zero[r][1]);
    needs_x_sum = p.minimum || ballot(found) != 0;
  }

  // Steps 2 * pair and 2 * pair + 1 of a unit: two of the registers that codes_from_planes makes.
  __device__ void multiply_pair(const uint32_t (&codes)[kRowTiles][2][8], int pair,
                                const char* tokens, int token_pair) {
    uint32_t a[kRowTiles][2][4];
    ANYBIT_UNROLL
    for (int r = 0; r < kRowTiles; ++r) {
      ANYBIT_UNROLL
      for (int half = 0; half < 2; ++half) {  // rows g, g + 8
        const int32_t zero = terms.zero[r][half];
        const Number number(p.minimum || far(zero) ? 0 : zero);
        ANYBIT_UNROLL
        for (int step = 0; step < 2; ++step) {
          ANYBIT_UNROLL
          for (int part = 0; part < 2; ++part)
            a[r][step][2 * part + half] = number(codes[r][half][2 * pair + step], part);
        }
      }
    }
    ANYBIT_UNROLL
    for (int t = 0; t < kTokenTiles; ++t) {
      uint32_t b[4];
      load_token_fragments(b, tokens, t, token_pair);
      ANYBIT_UNROLL
      for (int step = 0; step < 2; ++step) {
        const uint32_t b_step[2] = {b[2 * step], b[2 * step + 1]};
        ANYBIT_UNROLL
        for (int r = 0; r < kRowTiles; ++r) mma_float<T>(product[r][t], a[r][step], b_step);
      }
    }
    if (needs_x_sum) sum_x(tokens, token_pair);
  }

  // Rare but with a minimum, and therefore a second way over the tokens.
  __device__ void sum_x(const char* tokens, int token_pair) {
    const uint32_t ones[4] = {Number::kOnes, Number::kOnes, Number::kOnes, Number::kOnes};
    ANYBIT_UNROLL
    for (int t = 0; t < kTokenTiles; ++t) {
      uint32_t b[4];
      load_token_fragments(b, tokens, t, token_pair);
      mma_float<T>(x_sum[t], ones, {b[0], b[1]});
      mma_float<T>(x_sum[t], ones, {b[2], b[3]});
    }
  }

  __device__ void multiply_unit(const char* slot, int c, int unit) {
    uint32_t codes[kRowTiles][2][8];
    this->load_codes(codes, slot, c, unit);
    ANYBIT_UNROLL
    for (int pair = 0; pair < kWords; ++pair) {
      // 4 pairs of steps in 128 k, 2 in a chunk of tokens
      const int of_chunk = unit * kWords + pair;
      multiply_pair(codes, pair, slot + kWeightBytes + (2 * c + of_chunk / 2) * kTokenBytes,
                    of_chunk % 2);
    }
  }

  // The sums of a group become terms of the outputs.
  __device__ void close_group() {
    ANYBIT_UNROLL
    for (int r = 0; r < kRowTiles; ++r) {
      ANYBIT_UNROLL
      for (int t = 0; t < kTokenTiles; ++t) {
        ANYBIT_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int32_t zero = terms.zero[r][i / 2];
          float sum = product[r][t][i];
          if (!p.minimum && far(zero)) sum -= __int2float_rn(zero) * x_sum[t][i];
          total[r][t][i] += sum * terms.scale[r][i / 2];
          if (p.minimum) total[r][t][i] += __uint_as_float(uint32_t(zero)) * x_sum[t][i];
          product[r][t][i] = 0.0f;
        }
      }
    }
    ANYBIT_UNROLL
    for (int t = 0; t < kTokenTiles; ++t) {
      ANYBIT_UNROLL
      for (int i = 0; i < 4; ++i) x_sum[t][i] = 0.0f;
    }
  }

  __device__ void multiply(const char* slot, int stage) {
    this->walk(
        stage,
        [&](int c, int unit) {
          if constexpr (kGrouped) {
            if (this->group_word == 0) look_for_far_zeros();
          }
          multiply_unit(slot, c, unit);
        },
        [&] { close_group(); });
  }

  __device__ void finish(char* shared) {
    if constexpr (!kGrouped) close_group();
    if (!sum_over_k<Shape>(total, p, shared)) return;
    store_tile<Shape>(p, shared, total, this->warp * kRowTiles,
                      [](int) { return [](float v, int) { return v; }; });
  }
};

}  // namespace anybit
