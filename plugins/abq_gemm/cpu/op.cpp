// ABQGemm's row of the table of CPU ops.
#define ANYBIT_SET portable
#include "core/cpu/op.h"
#include "abq_gemm/cpu/layout.h"

namespace anybit::cpu {

void abq_gemm_portable(const GemmShape&, const GemmBuffers&, const Parallel&);
#if defined(__x86_64__)
void abq_gemm_avx2(const GemmShape&, const GemmBuffers&, const Parallel&);
void abq_gemm_avx512(const GemmShape&, const GemmBuffers&, const Parallel&);
#endif

namespace {

bool levels_ok(const GemmShape& s) {
  const bool balanced = (s.wbits == 2 && s.levels == 5) || (s.wbits == 1 && s.levels == 3);
  if (s.wbits < 1 || s.wbits > 8 || !(s.levels == 1 << s.wbits || balanced)) return false;
  return s.planes >= 1 && s.planes <= 8 && (s.levels - 1) >> (s.planes - 1) == 1;
}

bool supported(const GemmShape& s) {
  if (!levels_ok(s)) return false;
  if (s.abits == portable::kAbqWeightOnly) return true;
  const int64_t group_len = s.group_size ? s.group_size : s.k;  // int32 sums must not overflow
  return s.abits >= 2 && s.abits <= 8 && 128 * (s.levels - 1) * group_len < int64_t{1} << 31;
}

bool has_inputs(const GemmShape&, const GemmBuffers& b) { return b.weight && b.scale && b.zero; }

size_t workspace(const GemmShape& s) {
  using namespace portable;
  float* rows;
  if (s.abits == kAbqWeightOnly) return abq_float_memory(s, nullptr, &rows).used;
  return slab_memory(abq_layout(s), s.m, kAbqMoreRows, nullptr).bytes;
}

constexpr Op kOp = {"ABQGemm",
                    supported,
                    has_inputs,
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
