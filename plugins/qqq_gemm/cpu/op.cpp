// QQQGemm's row of the table of CPU ops.
#define ANYBIT_SET portable
#include "core/cpu/op.h"
#include "qqq_gemm/cpu/layout.h"
#include "qqq_gemm/rules.h"

namespace anybit::cpu {

ANYBIT_IF_MADE void qqq_gemm_portable(const GemmShape&, const GemmBuffers&, const Parallel&);
ANYBIT_IF_MADE void qqq_gemm_avx2(const GemmShape&, const GemmBuffers&, const Parallel&);
ANYBIT_IF_MADE void qqq_gemm_avx512(const GemmShape&, const GemmBuffers&, const Parallel&);
ANYBIT_IF_MADE void qqq_gemm_amx(const GemmShape&, const GemmBuffers&, const Parallel&);

namespace {

bool has_inputs(const GemmShape& s, const GemmBuffers& b) {
  return b.weight && b.scale && (!s.group_size || b.scale_group);
}

size_t workspace(const GemmShape& s) {
  using namespace portable;
  return slab_memory(qqq_layout(s), s.m, 0, nullptr).bytes;
}

constexpr Op kOp = {"QQQGemm",
                    qqq_scheme_ok,
                    has_inputs,
                    workspace,
                    {qqq_gemm_portable, qqq_gemm_avx2, qqq_gemm_avx512, qqq_gemm_amx}};
const OpRegistration registration(row_of<kOp>());

}  // namespace
}  // namespace anybit::cpu
