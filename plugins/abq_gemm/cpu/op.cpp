// ABQGemm's row of the table of CPU ops.
#define ANYBIT_SET portable
#include "core/cpu/op.h"
#include "abq_gemm/cpu/layout.h"
#include "abq_gemm/rules.h"

namespace anybit::cpu {

ANYBIT_FOR_SETS(ANYBIT_DECLARE_RUN, abq_gemm)

namespace {

size_t workspace(const GemmShape& s) {
  using namespace portable;
  float* rows;
  if (abq_digits(s) == 0) return abq_float_memory(s, nullptr, &rows).used;
  if (s.abits != kAbqWeightOnly) return abq_slab_bytes(s);
  GemmShape one = s;  // token that digits do not write
  one.m = 1;
  return abq_slab_bytes(s) + abq_float_memory(one, nullptr, &rows).used;
}

constexpr Op kOp = {
    "ABQGemm", abq_scheme_ok, abq_has_inputs, workspace, {ANYBIT_FOR_SETS(ANYBIT_LIST, abq_gemm)}};
const OpRegistration registration(row_of<kOp>());

}  // namespace
}  // namespace anybit::cpu
