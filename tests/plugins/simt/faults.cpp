// Kernels with planted faults, to prove that the CPU simulation notices them.
#include "core/device/ptx.cuh"
#include "core/device/ptx_sm90.cuh"
#include "core/host/launch.h"

using namespace anybit;

namespace {

// out[i] = in[last - i] through shared memory.
void reverse(const int* in, int* out, bool forget_sync) {
  int* tile_sh = dynamic_shared<int>();
  const int i = threadIdx.x;
  tile_sh[i] = in[i];
  if (!forget_sync) __syncthreads();
  out[i] = tile_sh[blockDim.x - 1 - i];
}

// Three rounds through one tile; without the second barrier a thread overwrites what
// another still has to read.
void reverse_rounds(const int* in, int* out, bool forget_sync) {
  int* tile_sh = dynamic_shared<int>();
  const int i = threadIdx.x;
  int sum = 0;
  for (int round = 0; round < 3; ++round) {
    tile_sh[i] = in[i] + round;
    __syncthreads();
    sum += tile_sh[blockDim.x - 1 - i];
    if (!forget_sync) __syncthreads();
  }
  out[i] = sum;
}

void divergent_barrier(const int*, int* out, bool) {
  if (threadIdx.x < 7) __syncthreads();
  out[threadIdx.x] = int(shuffle_xor(1.0f, 1));
}

void early_exit(const int*, int* out, bool) {
  if (threadIdx.x == 3) return;
  __syncthreads();
  out[threadIdx.x] = 0;
}

void shared_overrun(const int* in, int* out, bool) {
  int* tile_sh = dynamic_shared<int>();
  tile_sh[threadIdx.x + 1] = in[threadIdx.x];
  out[threadIdx.x] = 0;
}

void partial_warp(const int*, int* out, bool) { out[threadIdx.x] = int(shuffle_xor(1.0f, 1)); }

// out[(block y * grid x + block x) * block x + thread x] = that index, over more
// blocks than run together.
void every_thread(const int*, int* out, bool) {
  const int i = (blockIdx.y * gridDim.x + blockIdx.x) * blockDim.x + threadIdx.x;
  out[i] = i;
}

void warp_steps(const int* in, int* out, bool) {
  const int lane = threadIdx.x % 32;
  const uint32_t odd = ballot(in[lane] & 1);
  out[threadIdx.x] = int(shuffle_xor(float(in[lane]), 16)) * 2 + int(odd >> lane & 1);
}

// A barrier in the first two ints of shared memory, behind it 16-byte aligned what is copied.
uint64_t* barrier_for(int arrivals) {
  uint64_t* barrier = dynamic_shared<uint64_t>();
  if (threadIdx.x == 0) init_barrier(barrier, arrivals);
  __syncthreads();
  return barrier;
}

// The first 4 ints by a bulk copy; every thread reads one of them.
void bulk_copy(const int* in, int* out, bool forget_wait) {
  uint64_t* barrier = barrier_for(1);
  int* tile_sh = dynamic_shared<int>() + 4;
  if (threadIdx.x == 0) {
    arrive_and_expect(barrier, 16);
    copy_bulk(tile_sh, in, 16, barrier);
  }
  if (!forget_wait) wait_for_phase(barrier, 0);
  out[threadIdx.x] = tile_sh[threadIdx.x % 4];
}

void nobody_arrives(const int*, int* out, bool) {
  uint64_t* barrier = barrier_for(1);
  wait_for_phase(barrier, 0);
  out[threadIdx.x] = 0;
}

void too_many_arrivals(const int*, int*, bool) { arrive_and_expect(barrier_for(1), 16); }

void bulk_of_12_bytes(const int* in, int*, bool) {
  uint64_t* barrier = barrier_for(1);
  copy_bulk(dynamic_shared<int>() + 4, in, 12, barrier);
}

void lonely_part(const int*, int* out, bool) {
  if (threadIdx.x < 32) sync_part<64>();
  out[threadIdx.x] = 0;
}

// The second of two slots' worth of work overwrites what a product that nobody
// has waited for still reads.
void late_product(const int*, int* out, bool forget_wait) {
  char* rows_sh = dynamic_shared<char>();
  for (int i = threadIdx.x; i < 8192; i += blockDim.x) rows_sh[i] = 1;
  __syncthreads();
  const uint32_t a[4] = {0x01010101, 0x01010101, 0x01010101, 0x01010101};
  int32_t d[8][4] = {};
  fence_products();
  wgmma<true>(d, a, SwizzledRows(rows_sh).part(0), true);
  commit_products();
  if (!forget_wait) wait_for_products<0>();
  __syncthreads();
  for (int i = threadIdx.x; i < 8192; i += blockDim.x) rows_sh[i] = 2;
  __syncthreads();
  wait_for_products<0>();
  out[threadIdx.x] = d[0][0];
}

void product_without_fence(const int*, int*, bool) {
  const uint32_t a[4] = {};
  int32_t d[8][4];
  wgmma<true>(d, a, SwizzledRows(dynamic_shared<char>()).part(0), false);
}

}  // namespace

// Runs one kernel by name with `threads` threads per block and one int of shared memory each
// (late_product: 8 KiB); returns a cudaError_t.
ANYBIT_API int run_fault(const char* name, int grid_x, int grid_y, int threads, const int* in,
                         int* out, int forget_sync) {
  using Kernel = void (*)(const int*, int*, bool);
  const std::pair<const char*, Kernel> kernels[] = {
      {"reverse", reverse},
      {"reverse_rounds", reverse_rounds},
      {"divergent_barrier", divergent_barrier},
      {"early_exit", early_exit},
      {"shared_overrun", shared_overrun},
      {"partial_warp", partial_warp},
      {"every_thread", every_thread},
      {"warp_steps", warp_steps},
      {"bulk_copy", bulk_copy},
      {"nobody_arrives", nobody_arrives},
      {"too_many_arrivals", too_many_arrivals},
      {"bulk_of_12_bytes", bulk_of_12_bytes},
      {"lonely_part", lonely_part},
      {"late_product", late_product},
      {"product_without_fence", product_without_fence}};
  for (const auto& [key, kernel] : kernels)
    if (!std::strcmp(key, name))
      return launch({dim3(grid_x, grid_y), dim3(threads),
                     kernel == late_product ? 8192 : threads * sizeof(int)},
                    nullptr, kernel, in, out, forget_sync != 0);
  return cudaErrorInvalidValue;
}
