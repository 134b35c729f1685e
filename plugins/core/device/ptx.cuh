// The machine-level steps of the kernels, each with a device body and a host (simt) body;
// inline PTX belongs here only.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>
#ifdef __CUDACC__
#define ANYBIT_UNROLL _Pragma("unroll")
#define ANYBIT_ROLLED _Pragma("unroll 1")  // keeps code small where unrolling gains nothing
#else
#include "core/sim/simt.h"
#define ANYBIT_UNROLL
#define ANYBIT_ROLLED
#endif

namespace anybit {

constexpr uint32_t kFullWarp = 0xffffffffu;

// The block's dynamic shared memory, 1024-byte aligned (what swizzles of 128 bytes need);
// its size is set at launch.
template <class T>
__device__ inline T* dynamic_shared() {
#ifdef __CUDACC__
  extern __shared__ __align__(1024) unsigned char raw_shared[];
  return reinterpret_cast<T*>(raw_shared);
#else
  return static_cast<T*>(simt::shared_memory());
#endif
}

// Where in shared memory, as the instructions take it; in the simulation, from the
// start of the block's own.
__device__ inline uint32_t shared_address(const void* p) {
#ifdef __CUDACC__
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
#else
  return static_cast<uint32_t>(static_cast<const char*>(p) -
                               static_cast<char*>(simt::shared_memory()));
#endif
}

// min and max in which NaN wins over every number (fminf and fmaxf drop it). PTX min.NaN.f32 and
// max.NaN.f32, sm_80 and later.
__device__ inline float min_nan(float a, float b) {
#ifdef __CUDACC__
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#else
  return a != a || a < b ? a : b;
#endif
}
__device__ inline float max_nan(float a, float b) {
#ifdef __CUDACC__
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#else
  return a != a || a > b ? a : b;
#endif
}

#ifndef __CUDACC__
// The lower one of two 16-bit numbers, T = __half or __nv_bfloat16.
template <class T>
float low_on_host(uint32_t bits) {
  const auto half = static_cast<unsigned short>(bits);
  if constexpr (std::is_same<T, __half>::value) return __half2float(__ushort_as_half(half));
  else return __bfloat162float(__ushort_as_bfloat16(half));
}

// a * b + c of both: exact in double up to the one rounding.
template <class T>
uint32_t fma2_on_host(uint32_t a, uint32_t b, uint32_t c) {
  const auto fma = [&](int shift) -> uint32_t {
    const double product = double(low_on_host<T>(a >> shift)) * double(low_on_host<T>(b >> shift));
    const double sum = product + double(low_on_host<T>(c >> shift));
    if constexpr (std::is_same<T, __half>::value) return __half_as_ushort(__double2half(sum));
    else return __bfloat16_as_ushort(__double2bfloat16(sum));
  };
  return fma(0) | fma(16) << 16;
}
#endif

// The same on two 16-bit values per register, T = __half or __nv_bfloat16. PTX min.NaN and
// max.NaN on .f16x2 or .bf16x2.
template <class T, bool kMax>
__device__ inline uint32_t min_or_max_nan2(uint32_t a, uint32_t b) {
#ifdef __CUDACC__
  uint32_t result;
  if constexpr (std::is_same<T, __half>::value && kMax)
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  else if constexpr (std::is_same<T, __half>::value)
    asm("min.NaN.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  else if constexpr (kMax) asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  else asm("min.NaN.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
#else
  const auto pick = [&](int shift) {
    const float x = low_on_host<T>(a >> shift), y = low_on_host<T>(b >> shift);
    return (x != x || (kMax ? x > y : x < y) ? a : b) >> shift & 0xffff;
  };
  return pick(0) | pick(16) << 16;
#endif
}

// `value` of lane (own lane ^ lane_mask). All 32 lanes must call it. PTX shfl.sync.bfly.b32.
__device__ inline float shuffle_xor(float value, int lane_mask) {
#ifdef __CUDACC__
  return __shfl_xor_sync(kFullWarp, value, lane_mask);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = simt::exchange({{bits}})[simt::me->lane ^ lane_mask].word[0];
  std::memcpy(&value, &bits, 4);
  return value;
#endif
}
__device__ inline int shuffle_xor(int value, int lane_mask) {
#ifdef __CUDACC__
  return __shfl_xor_sync(kFullWarp, value, lane_mask);
#else
  return int(simt::exchange({{uint32_t(value)}})[simt::me->lane ^ lane_mask].word[0]);
#endif
}

// Bit i = predicate of lane i. All 32 lanes must call it. PTX vote.sync.ballot.b32.
__device__ inline uint32_t ballot(bool predicate) {
#ifdef __CUDACC__
  return __ballot_sync(kFullWarp, predicate);
#else
  const simt::Registers* lanes = simt::exchange({{predicate}});
  uint32_t word = 0;
  for (int i = 0; i < 32; ++i) word |= lanes[i].word[0] << i;
  return word;
#endif
}

// ---- two fp16 or bf16 numbers in a register ----

// a * b + c, rounded once, half to even. PTX fma.rn.f16x2.
__device__ inline uint32_t half2_fma(uint32_t a, uint32_t b, uint32_t c) {
#ifdef __CUDACC__
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
#else
  return fma2_on_host<__half>(a, b, c);
#endif
}

// v limited to [lo, hi]; no NaN. PTX max.f16x2, min.f16x2.
__device__ inline uint32_t half2_limited(uint32_t v, uint32_t lo, uint32_t hi) {
#ifdef __CUDACC__
  asm("max.f16x2 %0, %0, %1;" : "+r"(v) : "r"(lo));
  asm("min.f16x2 %0, %0, %1;" : "+r"(v) : "r"(hi));
  return v;
#else
  const auto limit = [&](int shift) {
    const auto wide = [&](uint32_t bits) { return low_on_host<__half>(bits >> shift); };
    return (wide(v) < wide(lo) ? lo : wide(v) > wide(hi) ? hi : v) >> shift & 0xffff;
  };
  return limit(0) | limit(16) << 16;
#endif
}

// a * b + c of bf16 numbers, rounded once, half to even. PTX fma.rn.bf16x2, sm_80 and later.
__device__ inline uint32_t bfloat2_fma(uint32_t a, uint32_t b, uint32_t c) {
#ifdef __CUDACC__
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
#else
  return fma2_on_host<__nv_bfloat16>(a, b, c);
#endif
}

// v twice.
__device__ inline uint32_t pair_of(__half v) { return __half_as_ushort(v) * 0x10001u; }
__device__ inline uint32_t pair_of(__nv_bfloat16 v) { return __bfloat16_as_ushort(v) * 0x10001u; }

// Bits of `a` where mask is 1, of `b` elsewhere. PTX lop3.b32; the compiler makes two
// instructions of the same in C.
__device__ inline uint32_t pick(uint32_t a, uint32_t b, uint32_t mask) {
#ifdef __CUDACC__
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xca;" : "=r"(d) : "r"(mask), "r"(a), "r"(b));
  return d;
#else
  return (a & mask) | (b & ~mask);
#endif
}

// (v & mask) | bits. PTX lop3.b32, one instruction where the compiler makes two.
__device__ inline uint32_t masked_or(uint32_t v, uint32_t mask, uint32_t bits) {
#ifdef __CUDACC__
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(v), "r"(mask), "r"(bits));
  return d;
#else
  return (v & mask) | bits;
#endif
}

// ---- asynchronous copies, global to shared memory ----

// 16 bytes; past the first `from_bytes` (0 or 16) zeros arrive instead and `from` is not read. Both
// 16-byte aligned. PTX cp.async.cg.shared.global.
__device__ inline void copy_async16(void* to, const void* from, int from_bytes = 16) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(to)), "l"(from), "r"(from_bytes)
               : "memory");
#else
  simt::copy_async(to, from, 16, from_bytes);
#endif
}

// 4 bytes, both 4-byte aligned. PTX cp.async.ca.shared.global.
__device__ inline void copy_async4(void* to, const void* from) {
#ifdef __CUDACC__
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;"
               :
               : "r"(shared_address(to)), "l"(from)
               : "memory");
#else
  simt::copy_async(to, from, 4, 4);
#endif
}

// Close this thread's group of copies. PTX cp.async.commit_group.
__device__ inline void commit_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  simt::commit_copies();
#endif
}

// Wait until all but this thread's kPending youngest groups have arrived. PTX cp.async.wait_group.
template <int kPending>
__device__ inline void wait_for_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" : : "n"(kPending) : "memory");
#else
  simt::wait_for_copies(kPending);
#endif
}

// A hint that `from` will be read soon. PTX prefetch.global.L2.
__device__ inline void prefetch(const void* from) {
#ifdef __CUDACC__
  asm volatile("prefetch.global.L2 [%0];" : : "l"(from));
#else
  static_cast<void>(from);
#endif
}

// ---- programmatic dependent launch: sm_90 and later ----
// Elsewhere a launch simply follows the one before it.

// Everything that earlier launches of the stream wrote is visible after
// this. PTX griddepcontrol.wait.
__device__ inline void wait_for_earlier_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next launch of the stream may start now. PTX griddepcontrol.launch_dependents.
__device__ inline void let_next_launch_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- tensor cores ----
// Fragments of all three shapes below, with g = lane / 4 and q = lane % 4, an operand register
// holding 4 bytes of a row:
//   a[0] row g, bytes 4q..                  a[1] row g + 8, bytes 4q..
//   a[2] row g, bytes 16 + 4q..             a[3] row g + 8, bytes 16 + 4q..
//   b[0] column g, bytes 4q..               b[1] column g, bytes 16 + 4q..
//   c[0], c[1] row g, columns 2q, 2q + 1    c[2], c[3] row g + 8, the same columns
// A row of A or a column of B is 32 bytes: 256 b1, 32 s8 or u8, or 16 fp16 or bf16 elements.

// Four 8 x 16 byte matrices: lane l gives the address of row l % 8 of matrix l / 8 (16-byte
// aligned, shared memory) and gets bytes 4q.. of row g of each. PTX
// ldmatrix.sync.aligned.m8n8.x4.shared.b16.
__device__ inline void load_matrices(uint32_t (&r)[4], const void* row) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#else
  simt::Registers mine{};
  std::memcpy(mine.word, &row, sizeof row);
  const simt::Registers* lanes = simt::exchange(mine);
  for (int i = 0; i < 4; ++i) {
    const char* from;
    std::memcpy(&from, lanes[8 * i + simt::me->lane / 4].word, sizeof from);
    std::memcpy(&r[i], from + 4 * (simt::me->lane % 4), 4);
  }
#endif
}

#ifndef __CUDACC__
// C += A B for one warp, dot(bytes of a row of A, of a column of B) being
// the product of 4 bytes each.
template <class C, class Dot>
void mma_on_host(C (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Dot dot) {
  const simt::Registers* lanes = simt::exchange({{a[0], a[1], a[2], a[3], b[0], b[1]}});
  const int g = simt::me->lane / 4, q = simt::me->lane % 4;
  for (int i = 0; i < 4; ++i) {
    const int column = 2 * q + i % 2;
    for (int half = 0; half < 2; ++half)
      for (int part = 0; part < 4; ++part)
        c[i] += dot(lanes[4 * g + part].word[2 * half + i / 2],
                    lanes[4 * column + part].word[4 + half]);
  }
}

// 32 bytes that a sum runs over, as numbers of 16 bits: so the compiler multiplies eight at a time.
struct BytesOnHost {
  int16_t value[32];

  template <class Byte>
  static BytesOnHost of(const Byte (&bytes)[32]) {
    BytesOnHost wide;
    for (int i = 0; i < 32; ++i) wide.value[i] = bytes[i];
    return wide;
  }
  // Those of the row of A that words `first` and `first` + 2 of four lanes hold.
  template <class Byte>
  static BytesOnHost row(const simt::Registers* lanes, int first) {
    Byte bytes[32];
    for (int word = 0; word < 8; ++word)
      std::memcpy(bytes + 4 * word, &lanes[word % 4].word[first + word / 4 * 2], 4);
    return of(bytes);
  }
  // Those of the column of B that words 4 and 5 of four lanes hold.
  static BytesOnHost column(const simt::Registers* lanes) {
    int8_t bytes[32];
    for (int word = 0; word < 8; ++word)
      std::memcpy(bytes + 4 * word, &lanes[word % 4].word[4 + word / 4], 4);
    return of(bytes);
  }
  int32_t dot(const BytesOnHost& other) const {
    int32_t sum = 0;
    for (int i = 0; i < 32; ++i) sum += value[i] * other.value[i];
    return sum;
  }
};

// mma_on_host for bytes of A of this type and signed ones of B.
template <class Byte>
void mma_bytes_on_host(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const simt::Registers* lanes = simt::exchange({{a[0], a[1], a[2], a[3], b[0], b[1]}});
  const int g = simt::me->lane / 4, q = simt::me->lane % 4;
  const BytesOnHost rows[] = {BytesOnHost::row<Byte>(lanes + 4 * g, 0),
                              BytesOnHost::row<Byte>(lanes + 4 * g, 1)};
  const BytesOnHost columns[] = {BytesOnHost::column(lanes + 8 * q),
                                 BytesOnHost::column(lanes + 8 * q + 4)};
  for (int i = 0; i < 4; ++i) c[i] += rows[i / 2].dot(columns[i % 2]);
}
#endif

// C [16, 8] s32 += A [16, 32] u8 * B [32, 8] s8. PTX mma.sync.m16n8k32.
__device__ inline void mma_u8_s8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  mma_bytes_on_host<uint8_t>(c, a, b);
#endif
}

// C [16, 8] s32 += A [16, 32] s8 * B [32, 8] s8. PTX mma.sync.m16n8k32.
__device__ inline void mma_s8_s8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  mma_bytes_on_host<int8_t>(c, a, b);
#endif
}

// C [16, 8] s32 += popcount(A [16, 256] and B [256, 8]). PTX mma.sync.m16n8k256, sm_80 and later.
__device__ inline void mma_b1(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  mma_on_host(c, a, b, [](uint32_t x, uint32_t y) { return __popc(x & y); });
#endif
}

// C [16, 8] fp32 += A [16, 16] * B [16, 8], both fp16 (T = __half) or bf16 (T = __nv_bfloat16). PTX
// mma.sync.m16n8k16. The order of the sums is the hardware's own.
template <class T>
__device__ inline void mma_float(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
  if constexpr (std::is_same<T, __half>::value) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#else
  mma_on_host(c, a, b, [](uint32_t x, uint32_t y) {
    return low_on_host<T>(x) * low_on_host<T>(y) +
           low_on_host<T>(x >> 16) * low_on_host<T>(y >> 16);
  });
#endif
}

}  // namespace anybit
