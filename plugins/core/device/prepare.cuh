// The token kernels: x [m, k] becomes prepared tokens (tiles.cuh), quantised per token as in
// quantize.cuh, with RMSNorm before it if asked.
//
// A row is taken as 32-element words, a thread to a word: groups are padded to whole words, rows to
// whole 128-byte chunks, pads are code 0. The word stays in registers from the only read of x to
// the stores; a row of more than 64 KiB is read again in each pass. What a thread has at the end
// are 8 registers of 4 codes (16 of 2 fp16 or bf16 values); a 16-byte part of the output takes
// registers of up to 4 words, so neighbouring lanes swap registers until each has whole parts and
// the lanes of one store fill whole 32-byte sectors.
//
// Bit-exact with activation.py and with each other in all orders: codes, zero points, scales and
// sums. With RMSNorm, as the exported graph means it (Add rounds to T; the norm is computed wide,
// from the rounded sum, and rounded to T once):
//   v = round_T(x + residual)                                 exact
//   y = round_T((v * (1 / sqrt(mean(v^2) + eps))) * gamma)    in fp32; the sum of squares adds up
//       in an order of its own, and as the other factors are rounded to fp32 too, y may differ from
//       the wide result by one rounding to T: near ties of fp16 and bf16, half of all fp32
// and then codes, scales and zero points are exactly those of y. They do not depend on the
// number of tokens or blocks.
#pragma once
#include "core/device/quantize.cuh"
#include "core/device/words.cuh"
#include "core/host/prepare.h"

namespace anybit {

template <class T>
constexpr int kMaxPrepareThreads = 2048 / sizeof(T);  // with their words: 64 KiB of registers
// bytes: of each warp, the sum of squares and both ends of the range
constexpr size_t kPrepareShared = 3 * 32 * sizeof(float);

struct PrepareArgs {
  const void* x;  // [m, k]
  NormBuffers norm;
  float epsilon;
  int k;
  RowShape row;
  int words;  // of a padded row
  int unit_words, abits;
  int rows_per_token;  // 1, or for bit planes 2, 4 or 8
  // so many lanes from a multiple of it on hold words of one group, or pads
  int sum_lanes;
  bool symmetric, vectors;  // vectors: 16-byte loads are possible
  Tokens tokens;
  int n_counters;
};

// Calls f(word, value) for the words of this thread: `value` for the first, load(word) for the
// others. Warps stay together.
template <class T, class Load, class F>
__device__ void for_each_word(int words, Word<T>& value, Load load, F f) {
  for (int word = threadIdx.x;;) {
    f(word, value);
    word += blockDim.x;
    if (word >= round_up(words, 32)) return;
    value = load(word);
  }
}

// v[i] = all v[i] of the block combined, the same bits in every thread. combine(0, v) must be v.
template <int kCount, class F>
__device__ void reduce_block(float (&v)[kCount], float* warps_sh, F combine) {
  const auto reduce_warp = [&] {
    for (int lane_mask = 16; lane_mask > 0; lane_mask /= 2) {
      ANYBIT_UNROLL
      for (int i = 0; i < kCount; ++i) v[i] = combine(v[i], shuffle_xor(v[i], lane_mask));
    }
  };
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  reduce_warp();
  ANYBIT_UNROLL
  for (int i = 0; i < kCount; ++i)
    if (lane == 0) warps_sh[32 * i + threadIdx.x / 32] = v[i];
  __syncthreads();
  ANYBIT_UNROLL
  for (int i = 0; i < kCount; ++i) v[i] = lane < warps ? warps_sh[32 * i + lane] : 0.0f;
  reduce_warp();
}

// quantized() of quantize.cuh in fewer steps: adding 1.5 * 2^23 rounds to a whole number (half to
// even) and leaves it in the low bits. |v * inverse| < 2^22 in a row with a finite scale; in
// others both limits are 0.
class Coder {
 public:
  __device__ explicit Coder(const TokenQuant& q)
      : inverse_(q.inverse), offset_(q.zero - kMagicBits), lo_(q.lo), hi_(q.hi) {
    if (q.scale != q.scale) lo_ = hi_ = 0;
  }
  __device__ int operator()(float v) const {
    const int code = int(__float_as_uint(__fadd_rn(__fmul_rn(v, inverse_), 0x1.8p23f))) + offset_;
    return code < lo_ ? lo_ : code > hi_ ? hi_ : code;
  }

 private:
  static constexpr int kMagicBits = 0x4b400000;  // of 1.5 * 2^23
  float inverse_;
  int offset_, lo_, hi_;
};

// Byte j of r[i] = code of element index(i, j); 0 from element `count` on.
template <class T, class F>
__device__ void codes_of_word(uint32_t (&r)[8], const Word<T>& w, const Coder& coder, int count,
                              F index) {
  ANYBIT_UNROLL
  for (int i = 0; i < 8; ++i) {
    const uint32_t low = __byte_perm(coder(w[index(i, 0)]), coder(w[index(i, 1)]), 0x0040);
    r[i] =
        __byte_perm(low, __byte_perm(coder(w[index(i, 2)]), coder(w[index(i, 3)]), 0x0040), 0x5410);
  }
  if (count == 32) return;
  ANYBIT_UNROLL
  for (int i = 0; i < 8; ++i) {
    ANYBIT_UNROLL
    for (int j = 0; j < 4; ++j)
      if (index(i, j) >= count) r[i] &= ~(0xffu << 8 * j);
  }
}

// r[i] with bit s of byte j = bit i of byte j of the old r[s]: 8 x 8 bits
// transposed, in 4 bytes at once.
__device__ inline void transpose_bits(uint32_t (&r)[8]) {
  const uint32_t low_half[] = {0x55555555u, 0x33333333u, 0x0f0f0f0fu};
  ANYBIT_UNROLL
  for (int step = 2; step >= 0; --step) {
    ANYBIT_UNROLL
    for (int i = 0; i < 8; ++i) {
      const int distance = 1 << step;
      if (i & distance) continue;
      const uint32_t a = r[i], b = r[i + distance], mask = low_half[step];
      r[i] = (a & mask) | (b << distance & ~mask);
      r[i + distance] = (a >> distance & mask) | (b & ~mask);
    }
  }
}

// Exchanges register and lane numbers: of r[i] and r[i + kBit] (i & kBit == 0), lanes
// without the bit lane_mask give up r[i + kBit] and get their neighbour's r[i] there, lanes
// with it the other way round.
template <int kBit, int kRegs>
__device__ void swap_with_lanes(uint32_t (&r)[kRegs], int lane_mask) {
  const bool upper = threadIdx.x & lane_mask;
  ANYBIT_UNROLL
  for (int i = 0; i < kRegs; ++i) {
    if (i & kBit) continue;
    const uint32_t got = shuffle_xor(int(upper ? r[i] : r[i + kBit]), lane_mask);
    (upper ? r[i] : r[i + kBit]) = got;
  }
}

// store(part of the row, 16 bytes) for the slot order of a word: r[i] is what a lane of the GEMM
// takes for bits i (int8, 8 registers) or i / 2, half i % 2 of a k16 step (16 registers).
template <int kRegs, class F>
__device__ void store_slots(uint32_t (&r)[kRegs], int unit_words, int word, F store) {
  constexpr int kParts = kRegs / 4;  // of a word
  swap_with_lanes<1>(r, 1);
  if (unit_words == 4) {
    swap_with_lanes<2>(r, 2);
    ANYBIT_UNROLL
    for (int i = 0; i < kParts; ++i)
      store(word / 4 * 4 * kParts + 4 * i + word % 4,
            uint4{r[4 * i], r[4 * i + 1], r[4 * i + 2], r[4 * i + 3]});
  } else if (unit_words == 2) {
    ANYBIT_UNROLL
    for (int i = 0; i < kParts; ++i)
      store(word / 2 * 2 * kParts + 2 * i + word % 2,
            uint4{r[2 * i], r[2 * i + 2 * kParts], r[2 * i + 1], r[2 * i + 1 + 2 * kParts]});
  } else {
    ANYBIT_UNROLL
    for (int i = 0; i < kParts; ++i)
      store((word / 2 * 2 + i % 2) * kParts + i / 2 * 2 + word % 2,
            uint4{r[i], r[i + kParts], r[i + 2 * kParts], r[i + 3 * kParts]});
  }
}

__device__ inline void store_part(const Tokens& tokens, int row, int part, uint4 bytes) {
  *reinterpret_cast<uint4*>(tokens.rows +
                            token_offset(tokens.row_count, part / 8, row, part % 8 * 16)) = bytes;
}

// Adds the codes in r, of which the pads are 0, less `centre` for the whole word, to
// the sum of the word's group.
__device__ inline void add_to_sums(const PrepareArgs& p, const uint32_t (&r)[8], int m, int word,
                                   int centre) {
  int sum = -centre;
  ANYBIT_UNROLL
  for (int i = 0; i < 8; ++i) sum = __dp4a(int(r[i]), 0x01010101, sum);
  for (int lane_mask = p.sum_lanes / 2; lane_mask > 0; lane_mask /= 2)
    sum += shuffle_xor(sum, lane_mask);
  const int group = word / p.row.group_words;
  if (word % p.sum_lanes || group >= p.row.n_groups) return;
  int32_t* to = p.tokens.sums + size_t(group) * p.tokens.sum_pitch + m;
  if (p.row.group_words <= p.sum_lanes) *to = sum;
  else atomicAdd(to, sum);  // zeroed by this block before
}

// Quantises a word and stores its codes or bit planes. All lanes of the warp call it; pads
// past the row are not stored.
template <class T, TokenOrder kOrder>
__device__ void store_codes(const PrepareArgs& p, const Coder& coder, int zero, int m, int word,
                            const Word<T>& w) {
  uint32_t r[8];
  const auto store = [&](int part, uint4 bytes) {
    if (word < p.words) store_part(p.tokens, m, part, bytes);
  };
  const int count = span_of(p.row, word).count;
  if constexpr (kOrder == kNaturalCodes) {
    codes_of_word(r, w, coder, count, [](int i, int j) { return 4 * i + j; });
    if (p.tokens.sums) add_to_sums(p, r, m, word, zero * count);
    swap_with_lanes<4>(r, 1);
    store(word / 2 * 4 + word % 2, uint4{r[0], r[1], r[2], r[3]});
    store(word / 2 * 4 + word % 2 + 2, uint4{r[4], r[5], r[6], r[7]});
    return;
  }
  codes_of_word(r, w, coder, count, [](int i, int j) { return i + 8 * j; });
  if (p.tokens.sums) add_to_sums(p, r, m, word, zero * count);
  if constexpr (kOrder == kSlotCodes) {
    store_slots(r, p.unit_words, word, store);
  } else {
    transpose_bits(r);  // r[i]: plane i
    ANYBIT_UNROLL
    for (int i = 0; i < 8; ++i)
      if (i >= p.abits) r[i] = 0;
    swap_with_lanes<1>(r, 1);
    swap_with_lanes<2>(r, 2);
    ANYBIT_UNROLL
    for (int i = 0; i < 8; i += 4) {
      const int plane = i + word % 4;
      if (plane < p.rows_per_token && word < p.words)
        store_part(p.tokens, m * p.rows_per_token + plane, word / 4,
                   uint4{r[i], r[i + 1], r[i + 2], r[i + 3]});
    }
  }
}

// The values of a word in the slot order of m16n8k16: a register holds elements 16 half +
// bit and 16 half + 8 + bit.
template <class T>
__device__ void store_floats(const PrepareArgs& p, int m, int word, const Word<T>& w) {
  uint32_t r[16];
  ANYBIT_UNROLL
  for (int i = 0; i < 16; ++i) {
    const int element = i % 2 * 16 + i / 2;
    r[i] = w.bits(element) | w.bits(element + 8) << 16;
  }
  store_slots(r, p.unit_words, word, [&](int part, uint4 bytes) {
    if (word < p.words) store_part(p.tokens, m, part, bytes);
  });
}

// The tokens' input, x or RMSNorm(x + residual) * gamma, a word at a time.
template <class T, bool kNorm>
struct TokenInput {
  const PrepareArgs& p;
  size_t first;  // element of the token in x
  float inverse_rms = 0.0f;

  __device__ TokenInput(const PrepareArgs& args, int m) : p(args), first(size_t(m) * args.k) {}
  __device__ Word<T> sum(int word) const {
    const Span span = span_of(p.row, word);
    Word<T> v;
    for_each_part(static_cast<const T*>(p.x) + first, span, p.vectors,
                  [&](int i, const Part<T>& part) { v.part[i] = part; });
    if (!kNorm || !p.norm.residual) return v;
    for_each_part(
        static_cast<const T*>(p.norm.residual) + first, span, p.vectors,
        [&](int i, const Part<T>& part) {
          v.part[i].set([&](int j) { return rounded_to<T>(__fadd_rn(v.part[i][j], part[j])); });
        });
    return v;
  }
  __device__ void store_sum(int word, const Word<T>& v) const {
    store_word(static_cast<T*>(p.norm.residual_out) + first, span_of(p.row, word), p.vectors, v);
  }
  __device__ Word<T> normed(Word<T> v, int word) const {
    if (!kNorm) return v;
    for_each_part(
        static_cast<const T*>(p.norm.gamma), span_of(p.row, word), p.vectors,
        [&](int i, const Part<T>& part) {
          v.part[i].set([&](int j) {
            return rounded_to<T>(__fmul_rn(__fmul_rn(v.part[i][j], inverse_rms), part[j]));
          });
        });
    return v;
  }
  __device__ Word<T> operator()(int word) const { return normed(sum(word), word); }
};

// Grid: x tokens, y shares of a token. Every block of a token finds its range; warps of
// words take turns between them.
template <class T, TokenOrder kOrder, bool kNorm>
__global__ void __launch_bounds__(kMaxPrepareThreads<T>) prepare_kernel(PrepareArgs p) {
  if (kNorm) {
    const Span span = span_of(p.row, threadIdx.x);  // gamma is used late, and never changes
    if (span.count) prefetch(static_cast<const T*>(p.norm.gamma) + span.first);
  }
  wait_for_earlier_launch();  // for x, and until nobody reads the tokens that this overwrites
  let_next_launch_start();    // which waits in turn before it reads tokens
  const int m = blockIdx.x;
  const auto mine = [](int word) { return word / 32 % gridDim.y == blockIdx.y; };
  const size_t block = blockIdx.y * size_t(gridDim.x) + m;
  const size_t step = size_t(gridDim.x) * gridDim.y * blockDim.x;
  for (size_t i = block * blockDim.x + threadIdx.x; i < size_t(p.n_counters); i += step)
    p.tokens.counters[i] = 0;

  float* shared = dynamic_shared<float>();
  TokenInput<T, kNorm> input(p, m);
  Word<T> w = input.sum(threadIdx.x);
  const bool again = p.words > int(blockDim.x);  // after a pass, w is the thread's last word
  if constexpr (kNorm) {
    float squares[1] = {0.0f};
    for_each_word(
        p.words, w, [&](int word) { return input.sum(word); },
        [&](int word, const Word<T>& v) {
          ANYBIT_UNROLL
          for (int i = 0; i < 32; ++i) squares[0] += v[i] * v[i];
          if (p.norm.residual && mine(word)) input.store_sum(word, v);
        });
    reduce_block(squares, shared, [](float a, float b) { return a + b; });
    input.inverse_rms =
        __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(__fdiv_rn(squares[0], float(p.k)), p.epsilon)));
    w = again ? input(threadIdx.x) : input.normed(w, threadIdx.x);
  }
  if constexpr (kOrder == kSlotFloats) {
    for_each_word(p.words, w, input, [&](int word, const Word<T>& v) {
      if (mine(word)) store_floats(p, m, word, v);
    });
  } else {
    if (p.tokens.sums && p.row.group_words > p.sum_lanes)
      for (int g = threadIdx.x; g < p.row.n_groups; g += blockDim.x)
        p.tokens.sums[size_t(g) * p.tokens.sum_pitch + m] = 0;
    float ends[2] = {0.0f, 0.0f};  // -min and max
    for_each_word(p.words, w, input, [&](int, const Word<T>& v) { widen(ends, v); });
    reduce_block(ends, shared + 32, [](float a, float b) { return max_nan(a, b); });
    const TokenQuant quant = token_quant({-ends[0], ends[1]}, p.abits, p.symmetric);
    if (threadIdx.x == 0 && blockIdx.y == 0)
      p.tokens.scale[m] = quant.scale, p.tokens.zero[m] = quant.zero;
    const Coder coder(quant);
    if (again) w = input(threadIdx.x);
    for_each_word(p.words, w, input, [&](int word, const Word<T>& v) {
      if (mine(word)) store_codes<T, kOrder>(p, coder, quant.zero, m, word, v);
    });
  }
}

}  // namespace anybit
