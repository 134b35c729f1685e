// Streams five-level weights (codes 0..4) in several storages from device memory and makes u8 codes
// of them, 4 in a register.
//
//   planes   3 bit planes, 3 bits per weight, expanded as ABQGemm does
//   planes3  the same planes, expanded by fewer instructions
//   base5    3 codes are a number of 7 bits, 2.33 bits per weight; digits by multiplication
//   planes7  the same 125 numbers in another order, as 7 bit planes; 20 logic operations make
//            3 x 3 planes for 96 codes
//
// A warp takes a row, step by step; packed is [row][step][part][lane] 16-byte parts.
// benchmarks/w2b_packing.py writes them.
#include <cstring>

#include "abq_gemm/cuda/planes.cuh"
#include "core/host/launch.h"
#ifdef __CUDACC__
#include "abq_gemm/cuda/binary.cuh"
#include "abq_gemm/cuda/int8.cuh"
#endif

using namespace anybit;

namespace w2b {

constexpr int kWarps = 8;  // of a block

__device__ inline uint32_t word_of(const uint4& part, int i) {
  return i == 0 ? part.x : i == 1 ? part.y : i == 2 ? part.z : part.w;
}
__device__ inline uint32_t rotated_left(uint32_t v, int bits) {
  return v << bits | v >> (32 - bits);
}

// codes_from_planes() for exactly three: the third plane needs no masks, and
// no bit of it moves twice.
__device__ inline void codes_from_three(uint32_t low, uint32_t middle, uint32_t high,
                                        uint32_t (&out)[8]) {
  const uint32_t even = pick(low, middle << 1, 0x55555555u),
                 odd = pick(low >> 1, middle, 0x55555555u);
  const uint32_t quad[4] = {pick(even, high << 2, 0x33333333u), pick(odd, high << 1, 0x33333333u),
                            pick(even >> 2, high, 0x33333333u),
                            pick(odd >> 2, high >> 1, 0x33333333u)};
  ANYBIT_UNROLL
  for (int c = 0; c < 4; ++c) {
    out[c] = quad[c] & 0x07070707u;
    out[c + 4] = quad[c] >> 4 & 0x07070707u;
  }
}

// kThree: codes_from_three() instead of what ABQGemm uses.
template <bool kThree>
struct ThreePlanes {
  static constexpr int kParts = 6, kRegisters = 64;  // of a lane and step

  // use(i, register i of 4 codes), for all of them in order
  template <class Use>
  __device__ static void expand(const uint4 (&part)[kParts], Use use) {
    ANYBIT_UNROLL
    for (int i = 0; i < 8; ++i) {
      const uint4* half = part + i / 4 * 3;
      uint32_t codes[8];
      const uint32_t plane[4] = {word_of(half[0], i % 4), word_of(half[1], i % 4),
                                 word_of(half[2], i % 4), 0};
      if constexpr (kThree) codes_from_three(plane[0], plane[1], plane[2], codes);
      else codes_from_planes<4>(plane, codes);
      ANYBIT_UNROLL
      for (int s = 0; s < 8; ++s) use(8 * i + s, codes[s]);
    }
  }
};

struct Planes : ThreePlanes<false> {};
struct Planes3 : ThreePlanes<true> {};

struct Base5 {
  static constexpr int kParts = 7, kRegisters = 96;

  // The codes of 4 numbers q of 7 bits, one in each byte of `word` after `shift`: q / 128 = 0.abc
  // in base 5, rounded up. q in a lane of 16 bits times 5, 25, 125 (and 2, where it is not shifted
  // already) has 0a, ab, abc before the byte's point: the upper byte.
  template <int kShift>
  __device__ static void digits(uint32_t word, uint32_t (&out)[3]) {
    constexpr uint32_t kMask = 0x007f007fu << kShift, kOnce = 5u << (1 - kShift);
    const uint32_t even = word & kMask, odd = word >> 8 & kMask;
    const uint32_t a = __byte_perm(even * kOnce, odd * kOnce, 0x7351);
    const uint32_t ab = __byte_perm(even * (5 * kOnce), odd * (5 * kOnce), 0x7351);
    const uint32_t abc = __byte_perm(even * (25 * kOnce), odd * (25 * kOnce), 0x7351);
    out[0] = a;
    out[1] = ab - 5 * a;  // no byte borrows: each difference is a digit
    out[2] = abc - 5 * ab;
  }

  // The eighth bits of 28 bytes as 4 numbers, in bits 1..7 of each byte: bit 0 of words
  // 0, 2, 4, bit 7 of words 1, 3, 5, 6, put together in pairs that one rotation moves to
  // two places that are free.
  __device__ static uint32_t spare(const uint32_t (&w)[7]) {
    const uint32_t bits65 = rotated_left(pick(w[0], w[1], 0x01010101u), 6);
    const uint32_t bits21 = rotated_left(pick(w[2], w[3], 0x01010101u), 2);
    const uint32_t bits43 = rotated_left(pick(w[4], w[5], 0x01010101u), 4);
    return pick(pick(bits65, w[6], 0x60606060u), pick(bits43, bits21, 0x18181818u), 0xe0e0e0e0u);
  }

  template <class Use>
  __device__ static void expand(const uint4 (&part)[kParts], Use use) {
    ANYBIT_UNROLL
    for (int i = 0; i < 4; ++i) {
      uint32_t w[7], codes[3];
      ANYBIT_UNROLL
      for (int j = 0; j < 7; ++j) w[j] = word_of(part[j], i);
      ANYBIT_UNROLL
      for (int j = 0; j < 8; ++j) {
        if (j == 7) digits<1>(spare(w), codes);
        else if (j % 2 == 0 && j < 6) digits<1>(w[j], codes);
        else digits<0>(w[j], codes);
        ANYBIT_UNROLL
        for (int d = 0; d < 3; ++d) use(24 * i + 3 * j + d, codes[d]);
      }
    }
  }
};

struct Planes7 {
  static constexpr int kParts = 7, kRegisters = 96;

  // planes[d]: the three planes of digit d, lowest bit first, from the planes x[0..6] of the
  // numbers m AA BB CC (x[6] is m). m = 0: three codes below 4. m = 1: a 4 is among them, and
  //   CC   0: c is 4       1: b is 4, BB is c    2: a is 4, AA is c
  //        3: two or three are; AA is the one that BB names, of a, b, c
  __device__ static void split(const uint32_t (&x)[7], uint32_t (&planes)[3][3]) {
    const uint32_t m = x[6], many = m & x[1] & x[0];
    const uint32_t a4 = m & x[1] & (~x[0] | x[3] | x[2]);
    const uint32_t b4 = m & x[0] & (~x[1] | x[3] | ~x[2]);
    const uint32_t c4 = m & ~(x[1] ^ x[0]) & ~(x[1] & x[3] & ~x[2]);
    const uint32_t moved = m & ~c4;  // c is below 4 but not in CC
    ANYBIT_UNROLL
    for (int bit = 0; bit < 2; ++bit) {
      const uint32_t in_a = x[4 + bit], in_b = x[2 + bit], in_c = x[bit];
      planes[0][bit] = in_a & ~a4;
      planes[1][bit] = pick(in_a, in_b, many) & ~b4;
      planes[2][bit] = (pick(in_a, in_b, x[1]) & moved) | (in_c & ~m);
    }
    planes[0][2] = a4, planes[1][2] = b4, planes[2][2] = c4;
  }

  template <class Use>
  __device__ static void expand(const uint4 (&part)[kParts], Use use) {
    ANYBIT_UNROLL
    for (int i = 0; i < 4; ++i) {
      uint32_t x[7], planes[3][3], codes[8];
      ANYBIT_UNROLL
      for (int j = 0; j < 7; ++j) x[j] = word_of(part[j], i);
      split(x, planes);
      ANYBIT_UNROLL
      for (int d = 0; d < 3; ++d) {
        codes_from_three(planes[d][0], planes[d][1], planes[d][2], codes);
        ANYBIT_UNROLL
        for (int s = 0; s < 8; ++s) use(24 * i + 8 * d + s, codes[s]);
      }
    }
  }
};

struct Args {
  const uint4* packed;      // [rows][steps][parts][32]
  const uint32_t* against;  // [32] four int8 of each lane
  int* sums;                // [rows]
  uint32_t* codes;          // [rows][steps][32][registers]
  int rows, steps;
};

// consume(step, i, register i) for everything of this warp's row, loads of a step first.
template <class Storage, class Consume>
__device__ void walk(const Args& p, int row, Consume consume) {
  const uint4* from = p.packed + size_t(row) * p.steps * Storage::kParts * 32 + threadIdx.x % 32;
  ANYBIT_ROLLED
  for (int step = 0; step < p.steps; ++step) {
    uint4 part[Storage::kParts];
    ANYBIT_UNROLL
    for (int i = 0; i < Storage::kParts; ++i) part[i] = from[32 * i];
    from += 32 * Storage::kParts;
    Storage::expand(part, [&](int i, uint32_t codes) { consume(step, i, codes); });
  }
}

// sums[row] = the row's codes times the lanes' numbers.
template <class Storage>
__global__ void __launch_bounds__(32 * kWarps) stream_kernel(Args p) {
  const int row = blockIdx.x * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= p.rows) return;
  const int against = int(p.against[lane]);
  int sum = 0;
  walk<Storage>(p, row, [&](int, int, uint32_t codes) { sum = __dp4a(int(codes), against, sum); });
  for (int mask = 16; mask; mask /= 2) sum += shuffle_xor(sum, mask);
  if (lane == 0) p.sums[row] = sum;
}

template <class Storage>
__global__ void __launch_bounds__(32 * kWarps) expand_kernel(Args p) {
  const int row = blockIdx.x * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= p.rows) return;
  walk<Storage>(p, row, [&](int step, int i, uint32_t codes) {
    p.codes[((size_t(row) * p.steps + step) * 32 + lane) * Storage::kRegisters + i] = codes;
  });
}

template <class Storage>
cudaError_t run(const Args& p, cudaStream_t stream) {
  const LaunchShape shape{dim3(unsigned(p.rows + kWarps - 1) / kWarps), dim3(32 * kWarps)};
  return p.codes ? launch(shape, stream, expand_kernel<Storage>, p)
                 : launch(shape, stream, stream_kernel<Storage>, p);
}

}  // namespace w2b

#ifdef __CUDACC__
// "int8 64x8" with one scale per row, and "b1 64x8": their machine code tells what a GEMM
// does besides the expansion.
template __global__ void anybit::gemm<AbqInt8<4, 4, false, TileShape<4, 1, 1, 4, 3>>>(AbqGemmArgs);
template __global__ void anybit::gemm<AbqBinary<4, TileShape<4, 1, 1, 8, 2>>>(AbqGemmArgs);
#endif

// Enqueue one pass: sums of rows, or (where codes is not null) the codes. Returns a cudaError_t, or
// -1 for an unknown storage.
ANYBIT_API int run_w2b(const char* storage, const void* packed, const uint32_t* against, int* sums,
                       uint32_t* codes, int rows, int steps, void* stream) {
  const w2b::Args p{static_cast<const uint4*>(packed), against, sums, codes, rows, steps};
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  if (std::strcmp(storage, "planes") == 0) return w2b::run<w2b::Planes>(p, on);
  if (std::strcmp(storage, "planes3") == 0) return w2b::run<w2b::Planes3>(p, on);
  if (std::strcmp(storage, "base5") == 0) return w2b::run<w2b::Base5>(p, on);
  if (std::strcmp(storage, "planes7") == 0) return w2b::run<w2b::Planes7>(p, on);
  return -1;
}
