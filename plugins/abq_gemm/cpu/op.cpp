// ABQGemm's row of the table of CPU ops.
#define ANYBIT_SET portable
#include "core/cpu/op.h"
#include "abq_gemm/cpu/layout.h"
#include "abq_gemm/rules.h"

namespace anybit::cpu {

void abq_gemm_portable(const GemmShape&, const GemmBuffers&, const Parallel&);
#if defined(__x86_64__)
void abq_gemm_avx2(const GemmShape&, const GemmBuffers&, const Parallel&);
void abq_gemm_avx512(const GemmShape&, const GemmBuffers&, const Parallel&);
#endif

namespace {

size_t workspace(const GemmShape& s) {
  using namespace portable;
  float* rows;
  if (s.abits == kAbqWeightOnly) return abq_float_memory(s, nullptr, &rows).used;
  return slab_memory(abq_layout(s), s.m, kAbqMoreRows, nullptr).bytes;
}

constexpr Op kOp = {"ABQGemm",
                    abq_scheme_ok,
                    abq_has_inputs,
                    workspace,
#if defined(__x86_64__)
                    {abq_gemm_portable, abq_gemm_avx2, abq_gemm_avx512}
#else
                    {abq_gemm_portable}
#endif
};
const OpRegistration registration(row_of<kOp>());

}  // namespace
}  // namespace anybit::cpu
