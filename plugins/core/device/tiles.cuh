// How prepared tokens lie in memory: the layout that the token kernels write and every fast
// GEMM kernel copies as it is.
//
// A row is what a GEMM multiplies with a weight row: a token of int8 codes (1 byte per k) or of
// fp16 or bf16 values (2 bytes), or one bit plane of a token (1 bit). Rows are cut into chunks
// of 128 bytes; a chunk of all rows lies together, so that kTokens rows of it are one
// contiguous block, in the order of shared memory without bank conflicts (ldmatrix) and of the
// 128-byte swizzle of wgmma:
//   [chunk][row][128 bytes], the 16-byte part p of a row at place p ^ (row % 8)
// The order of k inside a row is the GEMM's own (abq_gemm/planes.cuh), because a sum does not care.
#pragma once
#include "core/device/ptx.cuh"

namespace anybit {

constexpr int kChunkBytes = 128;
// rows are padded to the largest token tile; pad rows hold anything
constexpr int kTokenRowsMultiple = 128;

// Where in the 128 bytes of a row its 16-byte part lies, row counted modulo 8.
__host__ __device__ inline int swizzled(int part, int row) { return (part ^ row) * 16; }

// Offset of byte `byte` (0..127) of a row's chunk among `rows` padded rows.
__host__ __device__ inline size_t token_offset(int rows, int chunk, int row, int byte) {
  return (size_t(chunk) * rows + row) * kChunkBytes + (swizzled(byte / 16, row % 8) + byte % 16);
}

// Prepared tokens as the GEMM kernels take them. In the workspace, written by the token kernels.
struct Tokens {
  uint8_t* rows;      // [chunks][row_count][128]
  int row_count;      // padded
  float* scale;       // [m]
  int32_t* zero;      // [m], all 0 for symmetric codes
  int32_t* sums;      // [n_groups][sum_pitch] of (code - zero) over a group, where the op needs it
  int sum_pitch;      // at least m
  int32_t* counters;  // one per output tile, set to 0 by the token kernel: how many blocks have
                      // finished their share of K
};

}  // namespace anybit
