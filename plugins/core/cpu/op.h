// An op's CPU kernels and their row of the table of ops (core/host/ops.h). A tactic is an
// instruction set; the stream of a call is a Parallel, or null for the calling thread alone.
#pragma once
#include "core/cpu/isa.h"
#include "core/cpu/parallel.h"
#include "core/host/ops.h"

namespace anybit::cpu {

using Run = void (*)(const GemmShape& shape, const GemmBuffers& buffers, const Parallel& parallel);

// Of a set's function: null in a library that was made without the set, since the compiler, the
// machine or a test library lacks it.
#define ANYBIT_IF_MADE __attribute__((weak))

// `use` of a function for each set of this architecture, named by op and set.
#if defined(__aarch64__)
#define ANYBIT_FOR_SETS(use, op) use(op##_portable) use(op##_neon)
#else
#define ANYBIT_FOR_SETS(use, op) use(op##_portable) use(op##_avx2) use(op##_avx512) use(op##_amx)
#endif
#define ANYBIT_DECLARE_RUN(name) \
  ANYBIT_IF_MADE void name(const GemmShape&, const GemmBuffers&, const Parallel&);
#define ANYBIT_LIST(name) name,

struct Op {
  const char* name;
  bool (*supported)(const GemmShape& shape);
  bool (*has_inputs)(const GemmShape& shape, const GemmBuffers& buffers);
  size_t (*workspace)(const GemmShape& shape);  // of a supported shape
  Run run[kIsaCount];                           // null for sets that are not made
};

// Tactic of a set, in the numbering of core/host/config.h: K is whole.
constexpr int32_t kTacticKernel = 64;
constexpr int32_t tactic_of(Isa isa) { return kTacticKernel * (isa + 1) + 1; }

// Whether every op can have such a shape: sizes, element type, norm.
bool plausible(const GemmShape& shape);

constexpr int kInvalid = 1;  // cudaErrorInvalidValue: a refused shape, or a missing buffer

size_t workspace_of(const Op& op, const GemmShape& shape);
int tactics_of(const Op& op, const GemmShape& shape, int32_t* tactics, int capacity);
const char* kernel_name(int32_t tactic);
int run_op(const Op& op, const GemmShape& shape, const GemmBuffers& buffers, void* parallel);

template <const Op& kOp>
AnybitOp row_of() {
  return {
      kOp.name,
      [](const GemmShape* shape) { return workspace_of(kOp, *shape); },
      [](const GemmShape* shape, int32_t* tactics, int capacity) {
        return tactics_of(kOp, *shape, tactics, capacity);
      },
      kernel_name,
      [](const GemmShape* shape, const GemmBuffers* buffers, void* parallel) {
        return run_op(kOp, *shape, *buffers, parallel);
      },
  };
}

}  // namespace anybit::cpu
