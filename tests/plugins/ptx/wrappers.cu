// One kernel for each wrapper of plugins/core/device/ptx.cuh: a warp takes `in` words per lane and
// gives `out` words per lane. Those of ptx_sm90.cuh work together in one kernel of four warps.
// Compiles with nvcc and with g++ (the CPU simulation); tests/plugins/test_ptx.py
// compares both with numpy.
#include "core/device/ptx.cuh"
#include "core/device/ptx_sm90.cuh"
#include "core/host/launch.h"

#include <cstring>

using namespace anybit;

namespace {

struct Words {
  const uint32_t* in;  // [lane][inputs]
  uint32_t* out;       // [lane][outputs]
  int inputs, outputs;

  __device__ uint32_t operator()(int i) const { return in[(threadIdx.x % 32) * inputs + i]; }
  __device__ uint32_t& result(int i) const { return out[(threadIdx.x % 32) * outputs + i]; }
};

template <class C, class Mma>
__device__ void mma(const Words& w, Mma multiply) {
  const uint32_t a[4] = {w(0), w(1), w(2), w(3)}, b[2] = {w(4), w(5)};
  C c[4];
  for (int i = 0; i < 4; ++i) {
    const uint32_t bits = w(6 + i);
    memcpy(&c[i], &bits, 4);
  }
  multiply(c, a, b);
  for (int i = 0; i < 4; ++i) memcpy(&w.result(i), &c[i], 4);
}

__global__ void run_mma_u8_s8(Words w) {
  mma<int32_t>(w, [](int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_u8_s8(c, a, b);
  });
}
__global__ void run_mma_s8_s8(Words w) {
  mma<int32_t>(w, [](int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_s8_s8(c, a, b);
  });
}
__global__ void run_mma_b1(Words w) {
  mma<int32_t>(
      w, [](int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_b1(c, a, b); });
}
template <class T>
__global__ void run_mma_float(Words w) {
  mma<float>(w, [](float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_float<T>(c, a, b);
  });
}

// Four 8 x 16 byte matrices, 512 bytes of in, row r of matrix i at 16 * (8 * i + r).
__global__ void run_load_matrices(Words w) {
  uint32_t* tile_sh = dynamic_shared<uint32_t>();
  for (int i = 0; i < 4; ++i) tile_sh[threadIdx.x * 4 + i] = w(i);
  __syncthreads();
  uint32_t r[4];
  load_matrices(r, tile_sh + threadIdx.x * 4);
  for (int i = 0; i < 4; ++i) w.result(i) = r[i];
}

// Word 0..3: copied; 4..7: zeros instead; 8: four bytes. Two groups, of which the
// older is waited for first.
__global__ void run_copies(Words w) {
  uint32_t* tile_sh = dynamic_shared<uint32_t>() + threadIdx.x * 12;
  for (int i = 0; i < 12; ++i) tile_sh[i] = 0xcbcbcbcbu;
  const uint32_t* from = w.in + (threadIdx.x % 32) * w.inputs;
  copy_async16(tile_sh, from);
  copy_async16(tile_sh + 4, from + 4, 0);
  commit_copies();
  copy_async4(tile_sh + 8, from + 8);
  commit_copies();
  wait_for_copies<1>();
  for (int i = 0; i < 8; ++i) w.result(i) = tile_sh[i];
  wait_for_copies<0>();
  w.result(8) = tile_sh[8];
}

// A copy that nothing waits for: the simulation must leave the old bytes.
__global__ void run_copy_without_wait(Words w) {
  uint32_t* tile_sh = dynamic_shared<uint32_t>() + threadIdx.x * 4;
  tile_sh[0] = 0xcbcbcbcbu;
  copy_async16(tile_sh, w.in + (threadIdx.x % 32) * w.inputs);
  commit_copies();
  w.result(0) = tile_sh[0];
}

__global__ void run_lanes(Words w) {
  const float v = __uint_as_float(w(0) & 0x3fffffff);
  float other = shuffle_xor(v, 5);
  memcpy(&w.result(0), &other, 4);
  w.result(1) = uint32_t(shuffle_xor(int(w(1)), 16));
  w.result(2) = anybit::ballot(w(1) & 1);
}

__global__ void run_pairs(Words w) {
  w.result(0) = half2_fma(w(0), w(1), w(2));
  w.result(1) = half2_limited(w(0), w(3), w(4));
  w.result(2) = bfloat2_fma(w(5), w(6), w(7));
  w.result(3) = __byte_perm(w(8), w(9), 0x6420);
  w.result(4) = uint32_t(__dp4a(int(w(8)), int(w(9)), 7));
}

__global__ void run_extremes(Words w) {
  const float low = min_nan(__uint_as_float(w(0)), __uint_as_float(w(1)));
  const float high = max_nan(__uint_as_float(w(0)), __uint_as_float(w(1)));
  w.result(0) = __float_as_uint(low);
  w.result(1) = __float_as_uint(high);
  w.result(2) = min_or_max_nan2<__half, false>(w(2), w(3));
  w.result(3) = min_or_max_nan2<__half, true>(w(2), w(3));
  w.result(4) = min_or_max_nan2<__nv_bfloat16, false>(w(4), w(5));
  w.result(5) = min_or_max_nan2<__nv_bfloat16, true>(w(4), w(5));
}

// D = A B^T (+ D) by four warps: A [64, 128] by the threads' copies and from there to registers,
// the swizzled rows of B by a bulk copy, both told to one barrier.
struct Products {
  const uint32_t* a;  // [128 threads][4 steps][4]
  const char* b;      // [8 * kTiles][128], swizzled
  int32_t* d;         // [128 threads][kTiles][4]
  int accumulate;
};

template <bool kUnsigned, int kTiles>
__global__ void __launch_bounds__(128) run_wgmma(Products p) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kBytes = 8 * kTiles * 128;
  char* b_sh = dynamic_shared<char>();
  uint64_t* barrier = reinterpret_cast<uint64_t*>(b_sh + kBytes);
  const int thread = threadIdx.x;
  uint32_t* a_sh = reinterpret_cast<uint32_t*>(b_sh + kBytes + 16) + thread * 16;
  if (thread == 0) {
    init_barrier(barrier, 128 + 1);
    fence_barriers();
  }
  __syncthreads();
  if (thread == 0) {
    arrive_and_expect(barrier, kBytes);
    copy_bulk(b_sh, p.b, kBytes, barrier);
  }
  for (int i = 0; i < 16; i += 4) copy_async16(a_sh + i, p.a + thread * 16 + i);
  arrive_after_copies(barrier);
  uint32_t a[4][4];
  int32_t d[kTiles][4];
  for (int i = 0; i < 4 * kTiles; ++i) d[i / 4][i % 4] = p.d[thread * 4 * kTiles + i];
  wait_for_phase(barrier, 0);
  for (int i = 0; i < 16; ++i) a[i / 4][i % 4] = a_sh[i];
  sync_part<128>();
  const SwizzledRows rows(b_sh);
  fence_products();
  ANYBIT_UNROLL
  for (int step = 0; step < 4; ++step)
    wgmma<kUnsigned>(d, a[step], rows.part(32 * step), step || p.accumulate);
  commit_products();
  wait_for_products<0>();
  settle_products(d);
  for (int i = 0; i < 4 * kTiles; ++i) p.d[thread * 4 * kTiles + i] = d[i / 4][i % 4];
#endif
}

using Kernel = void (*)(Words);
struct Named {
  const char* name;
  Kernel kernel;
};
const Named kKernels[] = {
    {"mma_u8_s8", run_mma_u8_s8},
    {"mma_s8_s8", run_mma_s8_s8},
    {"mma_b1", run_mma_b1},
    {"mma_fp16", run_mma_float<__half>},
    {"mma_bf16", run_mma_float<__nv_bfloat16>},
    {"load_matrices", run_load_matrices},
    {"copies", run_copies},
    {"copy_without_wait", run_copy_without_wait},
    {"lanes", run_lanes},
    {"pairs", run_pairs},
    {"extremes", run_extremes},
};

}  // namespace

// 0, a cudaError_t, or -1 for an unknown name; waits for the end.
ANYBIT_API int run_wrapper(const char* name, const uint32_t* in, uint32_t* out, int inputs,
                           int outputs) {
  for (const Named& named : kKernels) {
    if (std::strcmp(named.name, name) != 0) continue;
    const cudaError_t error = launch({dim3(1), dim3(32), 32 * 48}, nullptr, named.kernel,
                                     Words{in, out, inputs, outputs});
#ifdef __CUDACC__
    if (error == cudaSuccess) return cudaDeviceSynchronize();
#endif
    return error;
  }
  return -1;
}

// The same for run_wgmma.
ANYBIT_API int run_products(int is_unsigned, int tiles, const uint32_t* a, const char* b,
                            int32_t* d, int accumulate) {
  const auto kernel = is_unsigned ? (tiles == 8 ? run_wgmma<true, 8> : run_wgmma<true, 16>)
                                  : (tiles == 8 ? run_wgmma<false, 8> : run_wgmma<false, 16>);
  const cudaError_t error = launch({dim3(1), dim3(128), size_t(tiles) * 1024 + 16 + 8192}, nullptr,
                                   kernel, Products{a, b, d, accumulate});
#ifdef __CUDACC__
  if (error == cudaSuccess) return cudaDeviceSynchronize();
#endif
  return error;
}
