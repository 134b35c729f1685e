// The C interface of what is computed number by number between the GEMMs and attention, which
// plugins/pointwise/README.md describes.
//
// Every function returns 0, or kInvalid (core/cpu/op.h) for a refused shape or a missing buffer.
// isa: an anybit::cpu::Isa that this machine has; below 0 the one that is chosen for the process.
// parallel: an anybit::cpu::Parallel, or null for the calling thread alone.
#pragma once
#include "core/cpu/parallel.h"
#include "core/host/params.h"

// Of Activation, in the order of ACTIVATIONS in forms.py.
enum ActivationKind : int32_t { kSilu, kGeluTanh, kRelu2, kActivationKinds };

// [rows, width] of one DType.
struct RowsShape {
  int64_t rows;
  int64_t width;
  int32_t dtype;
};

// sum = stream + multiplier * value.
struct SumBuffers {
  const void *stream, *value;
  void* sum;
};
ANYBIT_API int anybit_residual_sum(const RowsShape* shape, float multiplier,
                                   const SumBuffers* buffers, int32_t isa, const void* parallel);

// `y` [rows, width] is the activation of `x` [rows, width], or of the first half of `x`
// [rows, 2 width] times the other half.
struct ActivationBuffers {
  const void* x;
  void* y;
};
ANYBIT_API int anybit_activation(const RowsShape* shape, int32_t kind, int32_t gated,
                                 const ActivationBuffers* buffers, int32_t isa,
                                 const void* parallel);

struct NormBuffers {
  const void *x, *gain;  // [rows, width], [width]
  void* y;
};
ANYBIT_API int anybit_rms_norm(const RowsShape* shape, float epsilon, const NormBuffers* buffers,
                               int32_t isa, const void* parallel);

// Of RotatedHeads, what a norm of queries and keys runs over.
enum HeadNormKind : int32_t { kNoNorm, kEachHead, kAllHeads, kHeadNormKinds };

struct HeadsShape {
  int32_t batch;
  int32_t tokens;
  int32_t heads;
  int32_t kv_heads;
  int32_t head_dim;
  int32_t rotary;     // channels of a head that turn; 0 = none
  int32_t positions;  // rows of cos and sin
  int32_t norm;       // HeadNormKind
  int32_t dtype;
  float query_epsilon, key_epsilon;  // of the norms
};

struct HeadsBuffers {
  const void* qkv;                    // [batch, tokens, heads + 2 kv_heads, head_dim]
  const int64_t* position_ids;        // [batch, tokens], below `positions`
  const void *cos, *sin;              // [positions, rotary / 2]
  const void *query_gain, *key_gain;  // [head_dim], or of all heads
  void *query, *key, *value;          // [batch, heads or kv_heads, tokens, head_dim]
};
ANYBIT_API int anybit_rotated_heads(const HeadsShape* shape, const HeadsBuffers* buffers,
                                    int32_t isa, const void* parallel);

namespace anybit::cpu {

constexpr int32_t kMostHeadDim = 1024;

// The kernels of an instruction set.
struct Pointwise {
  void (*sum)(const RowsShape&, float multiplier, const SumBuffers&, const Parallel&);
  void (*activation)(const RowsShape&, int32_t kind, bool gated, const ActivationBuffers&,
                     const Parallel&);
  void (*norm)(const RowsShape&, float epsilon, const NormBuffers&, const Parallel&);
  void (*heads)(const HeadsShape&, const HeadsBuffers&, const Parallel&);
};
extern const Pointwise pointwise_portable;
#if defined(__x86_64__)
extern const Pointwise pointwise_avx2, pointwise_avx512;
#endif

}  // namespace anybit::cpu
