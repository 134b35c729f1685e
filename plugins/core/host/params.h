// The C interface of the kernels: plain structs and functions, the same in the CPU simulation
// and in the plugin library.
#pragma once
#include <cstddef>
#include <cstdint>

#define ANYBIT_API extern "C" __attribute__((visibility("default")))

// Element type of the activations x and y.
enum DType : int32_t { kFloat16 = 0, kBFloat16 = 1, kFloat32 = 2 };

// One GEMM: y[m, n] = x[m, k] * w[n, k]^T, or RMSNorm(x) * gamma in place of x. The fields mirror
// GemmAttributes of plugins/core/op_spec.py.
struct GemmShape {
  int32_t m;              // tokens; 0 is allowed and does nothing
  int32_t n;              // output features
  int32_t k;              // input features
  int32_t group_size;     // input features that share a weight scale; 0 = the whole row
  int32_t planes;         // bit planes that hold the codes 0..levels-1
  int32_t wbits;          // nominal weight bits
  int32_t levels;         // number of weight codes
  int32_t abits;          // activation bits 2..8, or 16 = activations stay floating point
  int32_t act_symmetric;  // 1 = symmetric activation codes
  int32_t dtype;          // DType of x and y
  // one that tactics() of the op lists; 0 = choose; for the workspace also kAnyTactic
  int32_t tactic;
  float norm_epsilon = 0.0f;  // of the RMSNorm of x; 0 = no norm
  int32_t has_minimum = 0;    // 1 = a minimum in the place of the zero points
};
constexpr int32_t kAnyTactic = -1;  // as much workspace as the hungriest tactic needs

// Device pointers (host pointers in the simulation); what an op does not use is null.
struct GemmBuffers {
  const void* x;            // [m, k] dtype
  const int32_t* weight;    // packed codes, see each op's README.md
  const float* scale;       // ABQGemm [n, n_groups]; QQQGemm [n]
  const int32_t* zero;      // ABQGemm [n, n_groups]
  const void* scale_group;  // QQQGemm per group: fp16 [n_groups, n]
  const float* bias;        // [n] or null
  void* y;                  // [m, n] dtype
  void* workspace;          // workspace(shape) bytes, 16-byte aligned, any content; null if 0
  const void* gamma;        // [k] dtype, with norm_epsilon
  const float* minimum;     // ABQGemm [n, n_groups], with has_minimum, and no zero
};

// One op of a kernel library: what the plugin, the self-test, the benchmarks and the tests call.
struct AnybitOp {
  const char* name;  // ONNX op type and plugin name, such as "ABQGemm"
  // Bytes of scratch memory that one call needs; 0 for a shape the op refuses. Depends on the shape
  // only, so one buffer of the largest size serves many calls on one stream.
  size_t (*workspace)(const GemmShape* shape);
  // Fills in the tactics that can run this shape on the current GPU, the default choice first, at
  // most `capacity`; returns how many there are. With fewer tokens a tactic runs as well; with many
  // more it may not.
  int (*tactics)(const GemmShape* shape, int32_t* tactics, int capacity);
  // Name of a tactic's kernel, such as "int8 64x8" (weight rows x tokens of a tile); "?" for a
  // number that is none.
  const char* (*kernel)(int32_t tactic);
  // Enqueues the GEMM on `cuda_stream` (a cudaStream_t). No allocation, no synchronisation, no
  // state kept between calls. Returns a cudaError_t: 0, cudaErrorInvalidValue (1) for a refused
  // shape or a missing buffer, or a launch error.
  int (*run)(const GemmShape* shape, const GemmBuffers* buffers, void* cuda_stream);
};

// The ops of this library in order of their names; returns how many there are.
ANYBIT_API int anybit_ops(const AnybitOp** ops);

// Orders of prepared tokens, the operand of the fast GEMM kernels (tiles.cuh says how rows lie in
// memory, prepare.cuh how k does).
enum TokenOrder : int32_t {
  kNaturalCodes = 0,  // int8 codes, k in order
  kSlotCodes = 1,     // int8 codes in the order of k_of_slot (abq_gemm/planes.cuh)
  kBitPlanes = 2,     // a row for each bit of the codes
  kSlotFloats = 3,    // fp16 or bf16 activations as they are, in slot order
};

// One preparation of x[m, k] as tokens.
struct PrepareShape {
  int32_t m;  // tokens; 0 is allowed and does nothing
  int32_t k;  // features
  // features that share a weight scale, each group padded to whole
  // 32-feature words; 0 = the whole row
  int32_t group_size;
  int32_t order;  // TokenOrder; kNaturalCodes has no groups
  // words of a unit of the slot orders: 4, 2 or 1; with several groups a divisor of their words
  int32_t unit_words;
  int32_t abits;          // 2..8; 16 with kSlotFloats
  int32_t act_symmetric;  // 1 = symmetric activation codes
  int32_t dtype;          // DType of x
  int32_t n_counters;     // counters to set to 0
  float epsilon;          // of the RMSNorm, if there is one
};

// Device pointers (host pointers in the simulation); what a shape does not use is null.
struct PrepareBuffers {
  const void* x;         // [m, k] dtype
  const void* gamma;     // [k] dtype, or null: no norm
  const void* residual;  // [m, k] dtype, or null
  void* residual_out;    // [m, k] dtype, with residual
  void* rows;            // anybit_prepare_rows(shape) bytes, 128-byte aligned
  float* scale;          // [m]
  int32_t* zero;         // [m]
  int32_t* sums;         // [n_groups, m] of (code - zero) over a group, or null
  int32_t* counters;     // [n_counters]
};

// The first step of every fast GEMM on its own, for tests and benchmarks. Bytes of the rows (0 for
// a refused shape), and the call itself, which returns a cudaError_t like the GEMMs.
ANYBIT_API size_t anybit_prepare_rows(const PrepareShape* shape);
ANYBIT_API int anybit_prepare_tokens(const PrepareShape* shape, const PrepareBuffers* buffers,
                                     void* cuda_stream);
