// QQQGemm's row of the table of CPU ops.
#define ANYBIT_SET portable
#include "core/cpu/op.h"
#include "qqq_gemm/cpu/layout.h"
#include "qqq_gemm/rules.h"

namespace anybit::cpu {

ANYBIT_FOR_SETS(ANYBIT_DECLARE_RUN, qqq_gemm)

namespace {

bool has_inputs(const GemmShape& s, const GemmBuffers& b) {
  return b.weight && b.scale && (!s.group_size || b.scale_group);
}

size_t workspace(const GemmShape& s) {
  using namespace portable;
  return slab_memory(qqq_layout(s), s.m, 0, nullptr).bytes;
}

constexpr Op kOp = {
    "QQQGemm", qqq_scheme_ok, has_inputs, workspace, {ANYBIT_FOR_SETS(ANYBIT_LIST, qqq_gemm)}};
const OpRegistration registration(row_of<kOp>());

}  // namespace
}  // namespace anybit::cpu
