// Refuses what no kernel takes, and hands the rest to the kernels of an instruction set.
#include "core/cpu/op.h"

#include "core/cpu/isa.h"
#include "pointwise/cpu/pointwise.h"

namespace anybit::cpu {
namespace {

constexpr const Pointwise* kPointwise[kIsaCount] = {
    &pointwise_portable,
#if defined(__x86_64__)
    &pointwise_avx2,
    &pointwise_avx512,
    &pointwise_avx512,  // with AMX as without
#elif defined(__aarch64__)
    &pointwise_portable,  // every compiler for it makes NEON of plain C++
#endif
};

// Those of a set; null where this machine has it not.
const Pointwise* kernels_of(int32_t isa) {
  if (isa < 0) {
    if (!chosen_isa().error.empty()) return nullptr;
    isa = chosen_isa().isa;
  }
  return isa <= best_isa() ? kPointwise[isa] : nullptr;
}

bool is_dtype(int32_t dtype) { return dtype >= kFloat16 && dtype <= kFloat32; }

bool plausible(const RowsShape& s) {
  return s.rows >= 0 && s.width >= 0 && is_dtype(s.dtype) &&
         (s.width == 0 || s.rows <= INT64_MAX / 16 / s.width);
}

bool plausible(const HeadsShape& s) {
  if (s.batch < 0 || s.tokens < 0 || s.heads < 1 || s.kv_heads < 1 || !is_dtype(s.dtype))
    return false;
  if (s.head_dim < 1 || s.head_dim > kMostHeadDim) return false;
  if (s.rotary < 0 || s.rotary > s.head_dim || s.rotary % 2) return false;
  return s.norm >= kNoNorm && s.norm < kHeadNormKinds;
}

bool has_inputs(const HeadsShape& s, const HeadsBuffers& b) {
  if (!b.qkv || !b.query || !b.key || !b.value) return false;
  if (s.norm != kNoNorm && (!b.query_gain || !b.key_gain)) return false;
  if (!s.rotary) return true;
  if (!b.cos || !b.sin || !b.position_ids) return false;
  for (int64_t i = 0; i < int64_t{s.batch} * s.tokens; ++i) {
    if (b.position_ids[i] < 0 || b.position_ids[i] >= s.positions) return false;
  }
  return true;
}

Parallel given(const void* parallel) {
  return parallel ? *static_cast<const Parallel*>(parallel) : Parallel{run_serially, nullptr, 1};
}

}  // namespace
}  // namespace anybit::cpu

using namespace anybit::cpu;

int anybit_residual_sum(const RowsShape* shape, float multiplier, const SumBuffers* b, int32_t isa,
                        const void* parallel) {
  const Pointwise* kernels = kernels_of(isa);
  if (!kernels || !plausible(*shape)) return kInvalid;
  if (shape->rows == 0 || shape->width == 0) return 0;
  if (!b->stream || !b->value || !b->sum) return kInvalid;
  kernels->sum(*shape, multiplier, *b, given(parallel));
  return 0;
}

int anybit_activation(const RowsShape* shape, int32_t kind, int32_t gated,
                      const ActivationBuffers* b, int32_t isa, const void* parallel) {
  const Pointwise* kernels = kernels_of(isa);
  if (!kernels || !plausible(*shape) || kind < 0 || kind >= kActivationKinds) return kInvalid;
  if (shape->rows == 0 || shape->width == 0) return 0;
  if (!b->x || !b->y) return kInvalid;
  kernels->activation(*shape, kind, gated != 0, *b, given(parallel));
  return 0;
}

int anybit_rms_norm(const RowsShape* shape, float epsilon, const NormBuffers* b, int32_t isa,
                    const void* parallel) {
  const Pointwise* kernels = kernels_of(isa);
  if (!kernels || !plausible(*shape)) return kInvalid;
  if (shape->rows == 0 || shape->width == 0) return 0;
  if (!b->x || !b->gain || !b->y) return kInvalid;
  kernels->norm(*shape, epsilon, *b, given(parallel));
  return 0;
}

int anybit_rotated_heads(const HeadsShape* shape, const HeadsBuffers* b, int32_t isa,
                         const void* parallel) {
  const Pointwise* kernels = kernels_of(isa);
  if (!kernels || !plausible(*shape)) return kInvalid;
  if (shape->batch == 0 || shape->tokens == 0) return 0;
  if (!has_inputs(*shape, *b)) return kInvalid;
  kernels->heads(*shape, *b, given(parallel));
  return 0;
}
