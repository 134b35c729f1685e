// Refuses what no kernel takes, and hands the rest to the kernels of an instruction set.
#include <cstdlib>

#include "cached_attention/cpu/attention.h"
#include "core/cpu/isa.h"
#include "core/cpu/op.h"

namespace anybit::cpu {
namespace {

constexpr Attend kAttend[kIsaCount] = {
    attend_portable,
#if defined(__x86_64__)
    attend_avx2,
    attend_avx512,
    attend_avx512,  // with AMX as without
#elif defined(__aarch64__)
    attend_portable,  // every compiler for it makes NEON of plain C++
#endif
};

bool plausible(const AttentionShape& s) {
  constexpr int32_t kMostDim = 1024, kMost = INT32_MAX / 2;
  if (s.batch < 0 || s.tokens < 0 || s.past < 0 || s.tokens > kMost || s.past > kMost) return false;
  if (s.kv_heads < 1 || s.heads < 1 || s.heads % s.kv_heads || s.heads > kMost) return false;
  if (s.head_dim < 1 || s.head_dim > kMostDim) return false;
  if (s.masks != 1 && s.masks != s.batch) return false;
  if (!(s.softcap >= 0)) return false;
  if (s.low_bits() && (s.bits < 2 || s.bits > 8 || s.head_dim % 8)) return false;
  return s.dtype >= kFloat16 && s.dtype <= kFloat32;
}

bool has_inputs(const AttentionShape& s, const AttentionBuffers& b) {
  if (s.tokens && (!b.query || !b.key || !b.value || !b.mask || !b.context)) return false;
  if (s.past && (!b.past_key || !b.past_value)) return false;
  if (s.present() && (!b.present_key || !b.present_value)) return false;
  if (s.low_bits()) {
    if (s.past && (!b.past_key_scale || !b.past_value_scale)) return false;
    if (s.present() && (!b.present_key_scale || !b.present_value_scale)) return false;
  }
  if (!s.static_cache)
    return !s.past || (b.past_key != b.present_key && b.past_value != b.present_value);
  if (!b.write_indices) return false;
  for (int32_t i = 0; i < s.batch; ++i) {
    if (b.write_indices[i] < 0 || b.write_indices[i] > s.past - s.tokens) return false;
  }
  return true;
}

struct Memory {
  void* at = nullptr;
  size_t bytes = 0;
  ~Memory() { std::free(at); }
};

}  // namespace

void* thread_memory(Use use, size_t bytes) {
  static thread_local Memory uses[kPartMemory + 1];
  Memory& own = uses[use];
  if (bytes > own.bytes) {
    std::free(own.at);
    own.at = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    own.bytes = own.at ? bytes : 0;
  }
  return own.at;
}

}  // namespace anybit::cpu

int anybit_attention(const AttentionShape* shape, const AttentionBuffers* buffers, int32_t isa,
                     const void* parallel) {
  using namespace anybit::cpu;
  if (isa < 0) {
    if (!chosen_isa().error.empty()) return kInvalid;
    isa = chosen_isa().isa;
  }
  if (isa > best_isa() || !plausible(*shape)) return kInvalid;
  if (shape->batch == 0) return 0;
  if (!has_inputs(*shape, *buffers)) return kInvalid;
  const Parallel serial{run_serially, nullptr};
  return kAttend[isa](*shape, *buffers,
                      parallel ? *static_cast<const Parallel*>(parallel) : serial);
}
