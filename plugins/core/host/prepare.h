// What the token kernels do, for the launchers of the GEMMs: x becomes Tokens in one of several
// orders, with or without RMSNorm.
#pragma once
#include "core/device/tiles.cuh"
#include "core/host/launch.h"

namespace anybit {

// Floating point before the quantisation, all null for none: y = RMSNorm(x + residual) *
// gamma takes the place of x.
struct NormBuffers {
  const void* gamma;     // [k] or null: no norm
  const void* residual;  // [m, k] or null
  void* residual_out;    // [m, k], x + residual; null without residual. Overlaps neither of the two
};

// False for a shape that no token kernel takes.
bool preparable(const PrepareShape& shape);
// Rows of prepared tokens, padded, and 128-byte chunks of a row.
int token_row_count(const PrepareShape& shape);
int token_chunks(const PrepareShape& shape);

// Enqueue the token kernel. tokens.row_count and tokens.sum_pitch (>= m) say how the buffers lie;
// tokens.sums may be null, and with kSlotFloats scale and zero are. overlap: start before the
// launch before it has ended (sm_90 and later).
cudaError_t prepare_tokens(const PrepareShape& shape, const void* x, const NormBuffers& norm,
                           const Tokens& tokens, bool overlap, cudaStream_t stream);

}  // namespace anybit
