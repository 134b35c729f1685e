// ABQGemm's row of the table of CPU ops.
#define ANYBIT_SET portable
#include "core/cpu/op.h"
#include "abq_gemm/cpu/layout.h"
#include "abq_gemm/rules.h"

namespace anybit::cpu {

ANYBIT_IF_MADE void abq_gemm_portable(const GemmShape&, const GemmBuffers&, const Parallel&);
ANYBIT_IF_MADE void abq_gemm_avx2(const GemmShape&, const GemmBuffers&, const Parallel&);
ANYBIT_IF_MADE void abq_gemm_avx512(const GemmShape&, const GemmBuffers&, const Parallel&);
ANYBIT_IF_MADE void abq_gemm_amx(const GemmShape&, const GemmBuffers&, const Parallel&);

namespace {

size_t workspace(const GemmShape& s) {
  using namespace portable;
  float* rows;
  const int digits = abq_digits(s);
  if (digits == 0) return abq_float_memory(s, nullptr, &rows).used;
  return slab_memory(abq_layout(s), int64_t{s.m} * digits, kAbqMoreRows, nullptr).bytes;
}

constexpr Op kOp = {"ABQGemm",
                    abq_scheme_ok,
                    abq_has_inputs,
                    workspace,
                    {abq_gemm_portable, abq_gemm_avx2, abq_gemm_avx512, abq_gemm_amx}};
const OpRegistration registration(row_of<kOp>());

}  // namespace
}  // namespace anybit::cpu
