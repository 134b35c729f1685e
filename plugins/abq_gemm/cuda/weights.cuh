// The weight side of every fast ABQGemm kernel: bit planes on their way from device
// memory to a lane's registers.
#pragma once
#include "abq_gemm/cuda/planes.cuh"
#include "core/device/pipeline.cuh"

namespace anybit {

struct AbqGemmArgs : GemmArgs {
  int n_groups, group_len, group_words, row_words;  // as AbqArgs
  int planes, abits;
  bool asymmetric;         // whether any token zero point may differ from 0
  int32_t zero_limit;      // up to this |zero|, D fits 32 bits
  const uint32_t* weight;  // [planes, n, row_words]
  const float* scale;      // [n, n_groups]
  const int32_t* zero;     // [n, n_groups] or null
  const float* minimum;    // [n, n_groups] where there is no zero, or null
};

constexpr int kChunkWords = 4;  // 32-bit words of a chunk's 128 k in one plane

// What a fragment's lane adds to its outputs: weight rows g and g + 8 of each tile.
template <int kRowTiles>
struct RowTerms {
  float scale[kRowTiles][2];
  int32_t zero[kRowTiles][2];  // the bits of the minimum where there is one
};

// A slot's bit planes: [plane][row][chunk][16 bytes], swizzled.
template <int kPlanes, class Shape>
struct AbqSlot {
  static constexpr int kChunks = Shape::kChunks;
  static constexpr int kPlaneBytes = Shape::kRows * kChunks * 16;
  static constexpr int kWeightBytes = kPlanes * kPlaneBytes;

  // Place of 16-byte part `chunk` of a row: 8 rows that one ldmatrix reads lie in different banks.
  __device__ static int part_offset(int row, int chunk) {
    return (row * kChunks + (chunk ^ row * kChunks / 8 % kChunks)) * 16;
  }
};

// What one of kThreads threads copies of every plane of every slot, from stage `first` on: 16-byte
// part thread % kChunks of a few rows.
template <int kPlanes, class Shape, int kThreads = Shape::kThreads>
class AbqCopies {
 public:
  __device__ AbqCopies(const AbqGemmArgs& args, int thread, int first)
      : p(args), copies_(thread < kRowsAtOnce * kChunks) {
    const int c = thread % kChunks, n0 = blockIdx.x * Shape::kRows;
    left_ = p.row_words / kChunkWords - first * kChunks - c;
    ANYBIT_UNROLL
    for (int i = 0; i < kCopies; ++i) {
      // rows past the last are not stored
      const int row = thread / kChunks + i * kRowsAtOnce, n = n0 + row < p.n ? n0 + row : p.n - 1;
      from_[i] = p.weight + size_t(n) * p.row_words + (first * kChunks + c) * kChunkWords;
      to_[i] = Slot::part_offset(row, c);
    }
  }

  __device__ void load_weights(char* slot) {
    const int from_bytes = left_ > 0 ? 16 : 0;  // zeros behind the row
    const size_t plane_words = size_t(p.n) * p.row_words;
    ANYBIT_UNROLL
    for (int i = 0; i < kCopies; ++i) {
      const uint32_t* from = from_[i];
      ANYBIT_UNROLL
      for (int j = 0; j < kPlanes; ++j, from += plane_words)
        if (copies_ && j < p.planes)
          copy_async16(slot + j * Slot::kPlaneBytes + to_[i], from, from_bytes);
      from_[i] += kChunks * kChunkWords;
    }
    left_ -= kChunks;
  }

 protected:
  const AbqGemmArgs& p;

 private:
  using Slot = AbqSlot<kPlanes, Shape>;
  static constexpr int kChunks = Shape::kChunks;
  static constexpr int kRowsAtOnce =
      kThreads / kChunks < Shape::kRows ? kThreads / kChunks : Shape::kRows;
  static constexpr int kCopies = Shape::kRows / kRowsAtOnce;

  const bool copies_;
  int left_;  // chunks of the row from this thread's on
  const uint32_t* from_[kCopies];
  int to_[kCopies];
};

// Weights and int8 codes, or 16-bit values (kTokenChunks 2 for 128 k).
template <int kPlanes, class Shape, int kTokenChunks = 1>
class AbqTileCopies : public AbqCopies<kPlanes, Shape> {
 public:
  __device__ AbqTileCopies(const AbqGemmArgs& args, int thread, int first)
      : AbqCopies<kPlanes, Shape>(args, thread, first),
        tokens_(args, thread, first * kChunks, args.row_words / kChunkWords * kTokenChunks) {}
  __device__ void load_tokens(char* slot) {
    tokens_.load(slot + AbqSlot<kPlanes, Shape>::kWeightBytes);
  }

 private:
  static constexpr int kChunks = Shape::kChunks * kTokenChunks;
  TokenCopies<kChunks, Shape> tokens_;
};

// kPlanes: 2, 4 or 8, of which p.planes are there, at least kSure. kWords: unit of planes.cuh.
// kGrouped: several scales per row.
template <int kPlanes, int kWords, bool kGrouped, class Shape,
          int kSure = kPlanes == 2 ? 1 : kPlanes / 2 + 1>
struct AbqPlanes : AbqSlot<kPlanes, Shape> {
  using Slot = AbqSlot<kPlanes, Shape>;
  using Slot::kChunks, Slot::kPlaneBytes, Slot::kWeightBytes, Slot::part_offset;
  static constexpr int kRowTiles = Shape::kRowTiles;

  const AbqGemmArgs& p;
  const int n0 = blockIdx.x * Shape::kRows, m0 = blockIdx.y * Shape::kTokens;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, q = threadIdx.x % 4;
  const int chunks = p.row_words / kChunkWords;
  int group = 0, group_word = 0;
  RowTerms<kRowTiles> terms;  // of the current group

  __device__ explicit AbqPlanes(const AbqGemmArgs& args) : p(args) {}

  __device__ bool is_there(int plane) const { return plane < kSure || plane < p.planes; }

  // plane[half][j]: this lane's word of plane j, of row g + 8 * half of tile r, its first bit of
  // unit `unit` of chunk c lowest.
  __device__ void load_planes(uint32_t (&plane)[2][kPlanes], const char* slot, int r, int c,
                              int unit) const {
    const int row = 16 * (warp * kRowTiles + r);
    if constexpr (kWords == 4) {  // word q of every row: two planes of both halves at a time
      const char* from = slot + part_offset(row + lane % 16, c) + lane / 16 * kPlaneBytes;
      ANYBIT_UNROLL
      for (int j = 0; j < kPlanes; j += 2) {
        uint32_t words[4];  // planes that are not there are anything
        load_matrices(words, from + j * kPlaneBytes);
        ANYBIT_UNROLL
        for (int i = 0; i < 4; ++i) plane[i % 2][j + i / 2] = is_there(j + i / 2) ? words[i] : 0;
      }
    } else {
      constexpr int kLanes = 4 / kWords;  // that share a word
      ANYBIT_UNROLL
      for (int half = 0; half < 2; ++half) {
        const char* from =
            slot + part_offset(row + lane / 4 + 8 * half, c) + 4 * (unit * kWords + q / kLanes);
        ANYBIT_UNROLL
        for (int j = 0; j < kPlanes; ++j) {
          const uint32_t word =
              is_there(j) ? *reinterpret_cast<const uint32_t*>(from + j * kPlaneBytes) : 0;
          plane[half][j] = word >> q % kLanes * 2 * kWords;
        }
      }
    }
  }

  // codes[r][half]: of rows g + 8 * half of tile r, all k of the unit.
  __device__ void load_codes(uint32_t (&codes)[kRowTiles][2][8], const char* slot, int c,
                             int unit) const {
    ANYBIT_UNROLL
    for (int r = 0; r < kRowTiles; ++r) {
      uint32_t plane[2][kPlanes];
      load_planes(plane, slot, r, c, unit);
      codes_from_planes<kPlanes>(plane[0], codes[r][0]);
      codes_from_planes<kPlanes>(plane[1], codes[r][1]);
    }
  }

  __device__ int row_of(int r, int half) const {
    const int n = n0 + 16 * (warp * kRowTiles + r) + lane / 4 + 8 * half;
    return n < p.n ? n : p.n - 1;
  }

  __device__ void load_terms(int of_group) {
    ANYBIT_UNROLL
    for (int r = 0; r < kRowTiles; ++r) {
      ANYBIT_UNROLL
      for (int half = 0; half < 2; ++half) {
        const size_t at = size_t(row_of(r, half)) * p.n_groups + of_group;
        terms.scale[r][half] = p.scale[at];
        terms.zero[r][half] = p.zero ? p.zero[at] : int32_t(__float_as_uint(p.minimum[at]));
      }
    }
  }

  __device__ int token_of(int t, int i) const {
    const int m = m0 + 8 * t + 2 * q + i % 2;
    return m < p.m ? m : p.m - 1;
  }

  // Term of a group with a minimum, of centred = P - z * Q and sum = S (int8.cuh).
  __device__ static float term_with_minimum(int32_t centred, float scale, int32_t sum,
                                            float minimum) {
    return __fadd_rn(__fmul_rn(__int2float_rn(centred), scale),
                     __fmul_rn(__int2float_rn(sum), minimum));
  }

  // D = centred - zero * sum (int8.cuh) as a float, in 64 bits only where it may need them.
  __device__ float difference(int32_t centred, int32_t zero, int32_t sum) const {
    if (zero > p.zero_limit || zero < -p.zero_limit)
      return __ll2float_rn(centred - int64_t{zero} * sum);
    return __int2float_rn(centred - zero * sum);
  }

  // Outputs of channel n, one scale per row: f(P - z * Q of the whole row, m), without the bias.
  __device__ auto outputs_of(int n) const {
    return [this, zero = p.zero ? p.zero[n] : 0, minimum = p.minimum ? p.minimum[n] : 0.0f,
            scale = p.scale[n]](int32_t centred, int m) {
      const int32_t sum = p.tokens.sums[m];
      const float term = p.minimum ? term_with_minimum(centred, scale, sum, minimum)
                                   : __fmul_rn(difference(centred, zero, sum), scale);
      const float v = __fadd_rn(0.0f, term);  // as the sum of one group: never -0
      return __fmul_rn(v, p.tokens.scale[m]);
    };
  }

  __device__ void open_group(int next) {
    group = next, group_word = 0;
    if (group < p.n_groups) load_terms(group);
  }

  // A share of K begins with a group.
  __device__ void begin(int stage) {
    if constexpr (kGrouped) open_group(stage * kChunks * kChunkWords / p.group_words);
  }

  // multiply(chunk of the slot, unit) for the units of a slot, close() at the end of every group
  // but with one group per row.
  template <class Multiply, class Close>
  __device__ void walk(int stage, Multiply multiply, Close close) {
    ANYBIT_ROLLED
    for (int c = 0; c < kChunks; ++c) {
      const int chunk = stage * kChunks + c;
      if (chunk >= chunks) return;
      if constexpr (!kGrouped) {
        multiply(c, 0);
      } else {
        ANYBIT_ROLLED
        for (int unit = 0; unit < 4 / kWords; ++unit) {
          if (group >= p.n_groups) return;  // the padding of the row
          multiply(c, unit);
          group_word += kWords;
          if (group_word < p.group_words) continue;
          close();
          open_group(group + 1);
        }
      }
    }
  }
};

}  // namespace anybit
