// ABQGemm on int8 tensor cores: codes of any bits are put together from their planes in registers (planes.cuh).
//
// With P = sum a q, A = sum a, Q = sum q over a group of L elements, token zero point z and weight zero point zero:
//   D = sum (a - z)(q - zero) = P - zero * A - z * (Q - L * zero)                                            exact
// P comes from the tensor core, A from the token kernel, Q from the tensor core too, with a fragment of ones as tokens.
#pragma once
#include "abq_gemm/planes.cuh"
#include "core/pipeline.cuh"

namespace anybit {

struct AbqGemmArgs : GemmArgs {
  int n_groups, group_len, group_words, row_words;  // as AbqArgs
  int planes;
  bool asymmetric;           // whether any token zero point may differ from 0
  int32_t zero_limit;        // up to this |zero|, D fits 32 bits
  const uint32_t* weight;    // [planes, n, row_words]
  const float* scale;        // [n, n_groups]
  const int32_t* zero;       // [n, n_groups]
};

constexpr int kChunkWords = 4;  // 32-bit words of a chunk's 128 k in one plane

// What a fragment's lane adds to its outputs: weight rows g and g + 8 of each tile.
template <int kRowTiles>
struct RowTerms {
  float scale[kRowTiles][2];
  int32_t zero[kRowTiles][2];
};

// kPlanes: 2, 4 or 8, of which p.planes are there. kWords: unit of planes.cuh. kGrouped: several scales per row.
template <int kPlanes, int kWords, bool kGrouped, class Shape_>
struct AbqInt8 {
  using Args = AbqGemmArgs;
  using Shape = Shape_;
  static constexpr int kRowTiles = Shape::kRowTiles, kTokenTiles = Shape::kTokenTiles, kChunks = Shape::kChunks;
  static constexpr int kPlaneBytes = Shape::kRows * kChunks * 16;  // one plane of a slot: [row][chunk][16 bytes], swizzled
  static constexpr int kWeightBytes = kPlanes * kPlaneBytes;
  static constexpr int kSlotBytes = kWeightBytes + kChunks * Shape::kTokens * kChunkBytes;
  static constexpr int kBlocksPerSm = 1;
  using Acc = typename std::conditional<kGrouped, float, int32_t>::type;

  const Args& p;
  const int n0 = blockIdx.x * Shape::kRows, m0 = blockIdx.y * Shape::kTokens;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, q = threadIdx.x % 4;
  const int chunks = p.row_words / kChunkWords;
  int32_t product[kRowTiles][kTokenTiles][4] = {};  // P of the current group
  int32_t code_sum[kRowTiles][4] = {};              // Q, the same in every column
  Acc acc[kRowTiles][kTokenTiles][4] = {};          // grouped: sum of float(D) * scale; per channel: P - z * Q
  RowTerms<kRowTiles> terms;                        // of the current group
  int group_word = 0, group = -1;

  __device__ explicit AbqInt8(const Args& args) : p(args) {}

  // Place of 16-byte part `chunk` of a row: 8 rows that one ldmatrix reads lie in different banks.
  __device__ static int part_offset(int row, int chunk) { return (row * kChunks + (chunk ^ row * kChunks / 8 % kChunks)) * 16; }

  __device__ void load_weights(char* slot, int stage) {
    constexpr int kParts = Shape::kRows * kChunks;
    const size_t plane_words = size_t(p.n) * p.row_words;
    for (int j = 0; j < p.planes; ++j) {
      for (int i = threadIdx.x; i < kParts; i += Shape::kThreads) {
        const int row = i / kChunks, c = i % kChunks, chunk = stage * kChunks + c;
        if (chunk >= chunks) continue;
        const int n = n0 + row < p.n ? n0 + row : p.n - 1;  // rows past the last repeat it and are not stored
        copy_async16(slot + j * kPlaneBytes + part_offset(row, c), p.weight + j * plane_words + size_t(n) * p.row_words + chunk * kChunkWords);
      }
    }
  }

  __device__ void load_tokens(char* slot, int stage) {
    copy_tokens<Shape>(slot + kWeightBytes, p.tokens, m0, stage * kChunks, chunks);
  }

  // plane[half][j]: this lane's word of plane j, of row g + 8 * half of tile r, its first bit of unit `unit` of chunk c lowest.
  __device__ void load_planes(uint32_t (&plane)[2][kPlanes], const char* slot, int r, int c, int unit) const {
    const int row = 16 * (warp * kRowTiles + r);
    if constexpr (kWords == 4) {  // word q of every row: two planes of both halves at a time
      const char* from = slot + part_offset(row + lane % 16, c) + lane / 16 * kPlaneBytes;
      ANYBIT_UNROLL
      for (int j = 0; j < kPlanes; j += 2) {
        uint32_t words[4] = {};
        if (j < p.planes) load_matrices(words, from + j * kPlaneBytes);
        ANYBIT_UNROLL
        for (int i = 0; i < 4; ++i) plane[i % 2][j + i / 2] = j + i / 2 < p.planes ? words[i] : 0;
      }
    } else {
      constexpr int kLanes = 4 / kWords;  // that share a word
      ANYBIT_UNROLL
      for (int half = 0; half < 2; ++half) {
        const char* from = slot + part_offset(row + lane / 4 + 8 * half, c) + 4 * (unit * kWords + q / kLanes);
        ANYBIT_UNROLL
        for (int j = 0; j < kPlanes; ++j) {
          const uint32_t word = j < p.planes ? *reinterpret_cast<const uint32_t*>(from + j * kPlaneBytes) : 0;
          plane[half][j] = word >> q % kLanes * 2 * kWords;
        }
      }
    }
  }

  // A fragment of k step `step` of a unit from the codes of rows g and g + 8.
  struct Fragment {
    uint32_t a[4];
  };
  __device__ static Fragment fragment(const uint32_t (&codes)[2][8], int step) {
    return {{codes[0][2 * step], codes[1][2 * step], codes[0][2 * step + 1], codes[1][2 * step + 1]}};
  }

  __device__ int row_of(int r, int half) const {
    const int n = n0 + 16 * (warp * kRowTiles + r) + lane / 4 + 8 * half;
    return n < p.n ? n : p.n - 1;
  }

  __device__ void load_terms(int of_group) {
    ANYBIT_UNROLL
    for (int r = 0; r < kRowTiles; ++r)
      ANYBIT_UNROLL
      for (int half = 0; half < 2; ++half) {
        const size_t at = size_t(row_of(r, half)) * p.n_groups + of_group;
        terms.scale[r][half] = p.scale[at];
        terms.zero[r][half] = p.zero[at];
      }
  }

  __device__ int token_of(int t, int i) const {
    const int m = m0 + 8 * t + 2 * q + i % 2;
    return m < p.m ? m : p.m - 1;
  }

  // End of a group: its integers become one fp32 term of every output.
  __device__ void close_group() {
    ANYBIT_UNROLL
    for (int t = 0; t < kTokenTiles; ++t) {
      int32_t a_sum[2], z[2];
      ANYBIT_UNROLL
      for (int i = 0; i < 2; ++i) {
        a_sum[i] = p.tokens.sums[size_t(group) * p.tokens.sum_pitch + token_of(t, i)];
        z[i] = p.asymmetric ? p.tokens.zero[token_of(t, i)] : 0;
      }
      ANYBIT_UNROLL
      for (int r = 0; r < kRowTiles; ++r)
        ANYBIT_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int32_t zero = terms.zero[r][i / 2], codes = code_sum[r][i];
          float d;
          if (zero <= p.zero_limit && zero >= -p.zero_limit) {
            d = __int2float_rn(product[r][t][i] - zero * a_sum[i % 2] - z[i % 2] * (codes - p.group_len * zero));
          } else {
            const int64_t wide = zero;
            d = __ll2float_rn(product[r][t][i] - wide * a_sum[i % 2] - z[i % 2] * (codes - p.group_len * wide));
          }
          acc[r][t][i] = __fadd_rn(acc[r][t][i], __fmul_rn(d, terms.scale[r][i / 2]));
          product[r][t][i] = 0;
        }
    }
    ANYBIT_UNROLL
    for (int r = 0; r < kRowTiles; ++r)
      ANYBIT_UNROLL
      for (int i = 0; i < 4; ++i) code_sum[r][i] = 0;
  }

  __device__ void sum_codes(const uint32_t (&codes)[kRowTiles][2][8]) {
    const uint32_t ones[2] = {0x01010101u, 0x01010101u};
    ANYBIT_UNROLL
    for (int r = 0; r < kRowTiles; ++r)
      ANYBIT_UNROLL
      for (int step = 0; step < kWords; ++step) mma_u8_s8(code_sum[r], fragment(codes[r], step).a, ones);
  }

  __device__ void multiply_unit(const char* slot, const char* tokens, int c, int unit) {
    uint32_t codes[kRowTiles][2][8];
    ANYBIT_UNROLL
    for (int r = 0; r < kRowTiles; ++r) {
      uint32_t plane[2][kPlanes];
      load_planes(plane, slot, r, c, unit);
      codes_from_planes<kPlanes>(plane[0], codes[r][0]);
      codes_from_planes<kPlanes>(plane[1], codes[r][1]);
    }
    if (p.asymmetric) sum_codes(codes);
    ANYBIT_UNROLL
    for (int t = 0; t < kTokenTiles; ++t)
      ANYBIT_UNROLL
      for (int pair = 0; pair < (kWords + 1) / 2; ++pair) {
        uint32_t b[4];
        load_token_fragments(b, tokens, t, (unit * kWords) / 2 + pair);
        ANYBIT_UNROLL
        for (int step = 0; step < (kWords == 1 ? 1 : 2); ++step) {
          const bool second = kWords == 1 ? unit % 2 : step;  // one word is half of a pair of steps
          const uint32_t b_step[2] = {second ? b[2] : b[0], second ? b[3] : b[1]};
          ANYBIT_UNROLL
          for (int r = 0; r < kRowTiles; ++r) mma_u8_s8(product[r][t], fragment(codes[r], 2 * pair + step).a, b_step);
        }
      }
  }

  __device__ void multiply(const char* slot, int stage) {
    ANYBIT_ROLLED
    for (int c = 0; c < kChunks; ++c) {
      const int chunk = stage * kChunks + c;
      if (chunk >= chunks) return;
      const char* tokens = slot + kWeightBytes + c * Shape::kTokens * kChunkBytes;
      if constexpr (!kGrouped) {
        multiply_unit(slot, tokens, c, 0);
        continue;
      }
      ANYBIT_ROLLED
      for (int unit = 0; unit < 4 / kWords; ++unit) {
        if (group < 0) open_group((chunk * kChunkWords + unit * kWords) / p.group_words);  // a share of K begins with a group
        if (group >= p.n_groups) return;  // the padding of the row
        multiply_unit(slot, tokens, c, unit);
        group_word += kWords;
        if (group_word < p.group_words) continue;
        close_group();
        open_group(group + 1);
      }
    }
  }

  __device__ void open_group(int next) {
    group = next, group_word = 0;
    if (group < p.n_groups) load_terms(group);
  }

  __device__ void finish(char* shared) {
    if constexpr (!kGrouped) {
      ANYBIT_UNROLL
      for (int t = 0; t < kTokenTiles; ++t)
        ANYBIT_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int32_t z = p.asymmetric ? p.tokens.zero[token_of(t, i)] : 0;
          ANYBIT_UNROLL
          for (int r = 0; r < kRowTiles; ++r) acc[r][t][i] = product[r][t][i] - z * code_sum[r][i];
        }
    }
    if (!sum_over_k(acc, p, shared)) return;
    if constexpr (!kGrouped) load_terms(0);
    store_tile<Shape>(p, shared, [&](int r, int t, int i) {
      const int m = token_of(t, i);
      float v;
      if constexpr (kGrouped) {
        v = acc[r][t][i];
      } else {
        const int64_t zero = terms.zero[r][i / 2], a_sum = p.tokens.sums[m], z = p.asymmetric ? p.tokens.zero[m] : 0;
        const int64_t d = acc[r][t][i] - zero * a_sum + z * p.group_len * zero;
        v = __fadd_rn(0.0f, __fmul_rn(__ll2float_rn(d), terms.scale[r][i / 2]));  // as the sum of one group: never -0
      }
      return __fmul_rn(v, p.tokens.scale[m]);
    });
  }
};

}  // namespace anybit
