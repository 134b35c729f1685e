// Kernels with planted faults, to prove that the CPU simulation notices them.
#include "core/launch.h"
#include "core/ptx.cuh"

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

// Three rounds through one tile; without the second barrier a thread overwrites what another still has to read.
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

// out[(block y * grid x + block x) * block x + thread x] = that index, over more blocks than run together.
void every_thread(const int*, int* out, bool) {
  const int i = (blockIdx.y * gridDim.x + blockIdx.x) * blockDim.x + threadIdx.x;
  out[i] = i;
}

void warp_steps(const int* in, int* out, bool) {
  const int lane = threadIdx.x % 32;
  const uint32_t odd = ballot(in[lane] & 1);
  out[threadIdx.x] = int(shuffle_xor(float(in[lane]), 16)) * 2 + int(odd >> lane & 1);
}

}  // namespace

// Runs one kernel by name with `threads` threads per block and one int of shared memory each; returns a cudaError_t.
ANYBIT_API int run_fault(const char* name, int grid_x, int grid_y, int threads, const int* in, int* out, int forget_sync) {
  using Kernel = void (*)(const int*, int*, bool);
  const std::pair<const char*, Kernel> kernels[] = {
      {"reverse", reverse},           {"reverse_rounds", reverse_rounds}, {"divergent_barrier", divergent_barrier},
      {"early_exit", early_exit},     {"shared_overrun", shared_overrun}, {"partial_warp", partial_warp},
      {"every_thread", every_thread}, {"warp_steps", warp_steps}};
  for (const auto& [key, kernel] : kernels)
    if (!std::strcmp(key, name))
      return launch({dim3(grid_x, grid_y), dim3(threads), threads * sizeof(int)}, nullptr, kernel, in, out, forget_sync != 0);
  return cudaErrorInvalidValue;
}
