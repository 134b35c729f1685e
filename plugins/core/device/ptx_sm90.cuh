// The machine-level steps that only compute capability 9.0 has (sm_90a code), each with a device
// body and a host (simt) body; with ptx.cuh the only place for inline PTX. Elsewhere nothing may
// call them: the kernels of warpgroup.cuh are empty there.
#pragma once
#include "core/device/ptx.cuh"

namespace anybit {

// ---- warps of different work in one block ----

// As __syncthreads() for the threads of kThreads / 32 whole warps, the same ones every time.
// PTX barrier.sync, barrier 1.
template <int kThreads>
__device__ inline void sync_part() {
#ifdef __CUDACC__
  asm volatile("barrier.sync 1, %0;" : : "n"(kThreads) : "memory");
#else
  simt::sync_part(kThreads);
#endif
}

// Registers of each thread from here on, for all threads of four whole warps: kMore gets them from
// those that other warps gave back. PTX setmaxnreg.sync.aligned.
template <bool kMore, int kRegisters>
__device__ inline void set_registers() {
#ifdef __CUDACC__
  if constexpr (kMore) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" : : "n"(kRegisters));
  else asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" : : "n"(kRegisters));
#endif
}

// ---- mbarriers ----
// 8 bytes of shared memory, on which threads wait for arrivals and for bytes that copies bring.

#ifndef __CUDACC__
inline simt::MBarrier* mbarrier_of(uint64_t* barrier) {
  return reinterpret_cast<simt::MBarrier*>(barrier);
}
#endif

// A phase of the barrier will end after `arrivals`. One thread does this; then fence_barriers() and
// __syncthreads(). PTX mbarrier.init.
__device__ inline void init_barrier(uint64_t* barrier, int arrivals) {
#ifdef __CUDACC__
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;"
               :
               : "r"(shared_address(barrier)), "r"(arrivals)
               : "memory");
#else
  *mbarrier_of(barrier) = {int16_t(arrivals), int16_t(arrivals), 0, 0};
#endif
}

// Makes initialised barriers known to asynchronous copies. PTX
// fence.mbarrier_init, fence.proxy.async.
__device__ inline void fence_barriers() {
#ifdef __CUDACC__
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Before an arrival that lets copy_bulk overwrite what this thread has read from shared
// memory. PTX fence.proxy.async.
__device__ inline void fence_reads() {
#ifdef __CUDACC__
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// One arrival. PTX mbarrier.arrive.
__device__ inline void arrive(uint64_t* barrier) {
#ifdef __CUDACC__
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];"
               :
               : "r"(shared_address(barrier))
               : "memory");
#else
  simt::arrive(*mbarrier_of(barrier));
#endif
}

// One arrival that also announces the bytes of copy_bulk() in this phase (below 2^20). PTX
// mbarrier.arrive.expect_tx.
__device__ inline void arrive_and_expect(uint64_t* barrier, int bytes) {
#ifdef __CUDACC__
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               :
               : "r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#else
  mbarrier_of(barrier)->bytes += bytes;
  simt::arrive(*mbarrier_of(barrier));
#endif
}

// One arrival, as soon as all copy_async of this thread so far have come. PTX
// cp.async.mbarrier.arrive.noinc.
__device__ inline void arrive_after_copies(uint64_t* barrier) {
#ifdef __CUDACC__
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];"
               :
               : "r"(shared_address(barrier))
               : "memory");
#else
  simt::arrive_after_copies(mbarrier_of(barrier));
#endif
}

// Wait until the phase of this parity has ended: 0 for the first, 1 for the second (and, at once,
// for the one before the first), ... PTX mbarrier.try_wait.parity.
__device__ inline void wait_for_phase(uint64_t* barrier, uint32_t parity) {
#ifdef __CUDACC__
  uint32_t done = 0;
  while (!done)
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
#else
  simt::wait_for_phase(mbarrier_of(barrier), parity);
#endif
}

// `bytes` from global to shared memory, all multiples of 16, told to the
// barrier. PTX cp.async.bulk.
__device__ inline void copy_bulk(void* to, const void* from, int bytes, uint64_t* barrier) {
#ifdef __CUDACC__
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
      :
      : "r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
#else
  simt::copy_bulk(to, from, bytes, mbarrier_of(barrier));
#endif
}

// ---- wgmma ----
// Four warps, each with 16 rows of A in the registers of mma.m16n8k32 (ptx.cuh); B is in shared
// memory.

// Operand B: rows (columns of the product) of 128 bytes in the 128-byte swizzle (tiles.cuh), from a
// multiple of 1024 bytes on; the multiplication takes 32 bytes of each row. PTX "Matrix
// descriptor", swizzle mode 1, 1024 bytes from 8 rows to the next.
class SwizzledRows {
 public:
  __device__ explicit SwizzledRows(const void* rows)
      : descriptor_(uint64_t{1} << 62 | uint64_t{1024 / 16} << 32 | uint64_t{1} << 16 |
                    (shared_address(rows) & 0x3ffff) / 16) {}
  // from byte `bytes` of each row on, a multiple of 32
  __device__ uint64_t part(int bytes) const { return descriptor_ + bytes / 16; }

 private:
  const uint64_t descriptor_;
};

// Before the first wgmma, and before one whose registers (A or product) have been written by
// something else. PTX wgmma.fence.
__device__ inline void fence_products() {
#ifdef __CUDACC__
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
  if (simt::me->products.empty()) simt::me->products.emplace_back();  // the open group
#endif
}

// Close the group of the multiplications issued so far. PTX wgmma.commit_group.
__device__ inline void commit_products() {
#ifdef __CUDACC__
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
  simt::me->products.emplace_back();
#endif
}

// Wait until all but the kPending youngest groups are done: then their registers may be read and
// written. PTX wgmma.wait_group.
template <int kPending>
__device__ inline void wait_for_products() {
#ifdef __CUDACC__
  asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(kPending) : "memory");
#else
  std::vector<std::vector<std::function<void()>>>& groups = simt::me->products;
  for (; groups.size() > kPending + 1; groups.erase(groups.begin()))
    for (const std::function<void()>& product : groups.front()) product();
  if (kPending == 0) groups.clear();  // what comes next needs a fence
#endif
}

#ifdef __CUDACC__
#define ANYBIT_TILE(t) "+r"(d[t][0]), "+r"(d[t][1]), "+r"(d[t][2]), "+r"(d[t][3])
#define ANYBIT_WGMMA_64(types)                                                          \
  asm volatile(                                                                         \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"                                      \
      "wgmma.mma_async.sync.aligned.m64n64k32.s32." types                               \
      " {"                                                                              \
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"                          \
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"                 \
      "}, {%32,%33,%34,%35}, %36, p;\n}"                                                \
      : ANYBIT_TILE(0), ANYBIT_TILE(1), ANYBIT_TILE(2), ANYBIT_TILE(3), ANYBIT_TILE(4), \
        ANYBIT_TILE(5), ANYBIT_TILE(6), ANYBIT_TILE(7)                                  \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)))
#define ANYBIT_WGMMA_128(types)                                                              \
  asm volatile(                                                                              \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"                                           \
      "wgmma.mma_async.sync.aligned.m64n128k32.s32." types                                   \
      " {"                                                                                   \
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"                               \
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"                     \
      "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"                     \
      "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"                      \
      "}, {%64,%65,%66,%67}, %68, p;\n}"                                                     \
      : ANYBIT_TILE(0), ANYBIT_TILE(1), ANYBIT_TILE(2), ANYBIT_TILE(3), ANYBIT_TILE(4),      \
        ANYBIT_TILE(5), ANYBIT_TILE(6), ANYBIT_TILE(7), ANYBIT_TILE(8), ANYBIT_TILE(9),      \
        ANYBIT_TILE(10), ANYBIT_TILE(11), ANYBIT_TILE(12), ANYBIT_TILE(13), ANYBIT_TILE(14), \
        ANYBIT_TILE(15)                                                                      \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)))
#endif

// After wait_for_products(): keeps the compiler from reading the registers any sooner.
template <int kTiles>
__device__ inline void settle_products(int32_t (&d)[kTiles][4]) {
#ifdef __CUDACC__
  ANYBIT_UNROLL
  for (int t = 0; t < kTiles; ++t) asm volatile("" : ANYBIT_TILE(t) : : "memory");
#else
  static_cast<void>(d);
#endif
}

#ifndef __CUDACC__
// One lane's part of wgmma, run by all lanes of the warp: element(row of A,
// byte of B) as in mma_on_host.
template <class Signed>
void wgmma_on_host(int32_t (*d)[4], int tiles, const uint32_t* a, uint64_t b, bool accumulate) {
  const simt::Registers* lanes =
      simt::exchange({{a[0], a[1], a[2], a[3], uint32_t(b), uint32_t(b >> 32), accumulate}});
  uint32_t differs = 0;
  for (int i = 0; i < 32; ++i)
    for (int word = 4; word < 7; ++word) differs |= lanes[i].word[word] ^ lanes[0].word[word];
  if (differs) throw std::runtime_error("simt: lanes of a wgmma differ in operand B");
  if (b >> 62 != 1)
    throw std::runtime_error("simt: a matrix descriptor without the 128-byte swizzle");
  // bytes; of 8 rows
  const uint32_t start = uint32_t(b & 0x3fff) * 16, stride = uint32_t(b >> 32 & 0x3fff) * 16;
  const int8_t* shared = static_cast<const int8_t*>(simt::shared_memory());
  const int g = simt::me->lane / 4, q = simt::me->lane % 4;
  const BytesOnHost rows[] = {BytesOnHost::row<Signed>(lanes + 4 * g, 0),
                              BytesOnHost::row<Signed>(lanes + 4 * g, 1)};
  for (int t = 0; t < tiles; ++t)
    for (int column = 0; column < 2; ++column) {
      const uint32_t row = start + t * stride + (2 * q + column) * 128;
      int8_t bytes[32];
      for (int part = 0; part < 32; part += 16) {  // the swizzle is made of address bits
        const uint32_t linear = row + part;
        std::memcpy(bytes + part, shared + (linear ^ (linear >> 7 & 7) << 4), 16);
      }
      const BytesOnHost b_column = BytesOnHost::of(bytes);
      for (int i = column; i < 4; i += 2)
        d[t][i] = (accumulate ? d[t][i] : 0) + rows[i / 2].dot(b_column);
    }
}
template <class Signed, int kTiles>
void wgmma_later(int32_t (&d)[kTiles][4], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  const auto product = [&d, &a, b, accumulate] {
    wgmma_on_host<Signed>(d, kTiles, a, b, accumulate);
  };
  if (simt::me->products.empty())
    throw std::runtime_error("simt: wgmma without wgmma.fence before it");
  if (simt::eager) return product();
  simt::me->products.back().push_back(product);
}
#endif

// D [64, 8 * kTiles] s32 = A [64, 32] u8 or s8 * B [32, 8 * kTiles] s8, plus the old D if
// `accumulate`. This warp's 16 rows of A and D are in a and d, in the order of mma_u8_s8; both
// belong to the hardware until wait_for_products(). PTX wgmma.mma_async.
template <bool kUnsigned, int kTiles>
__device__ inline void wgmma(int32_t (&d)[kTiles][4], const uint32_t (&a)[4], uint64_t b,
                             bool accumulate) {
  static_assert(kTiles == 8 || kTiles == 16, "the shapes that are used");
#ifdef __CUDACC__
  if constexpr (kTiles == 8 && kUnsigned) ANYBIT_WGMMA_64("u8.s8");
  else if constexpr (kTiles == 8) ANYBIT_WGMMA_64("s8.s8");
  else if constexpr (kUnsigned) ANYBIT_WGMMA_128("u8.s8");
  else ANYBIT_WGMMA_128("s8.s8");
#else
  wgmma_later<typename std::conditional<kUnsigned, uint8_t, int8_t>::type>(d, a, b, accumulate);
#endif
}

#ifdef __CUDACC__
#undef ANYBIT_TILE
#undef ANYBIT_WGMMA_64
#undef ANYBIT_WGMMA_128
#endif

}  // namespace anybit
