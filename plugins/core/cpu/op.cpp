// What every op's row of the table does around its kernels: refuses, lists, dispatches.
#include "core/cpu/op.h"

#include <cfloat>

namespace anybit::cpu {
namespace {

// The set that a tactic names; kIsaCount for a number that is none of this machine.
int isa_of(const Op& op, int32_t tactic) {
  for (int isa = kPortable; isa <= best_isa(); ++isa) {
    if (tactic == tactic_of(static_cast<Isa>(isa))) return op.run[isa] ? isa : kIsaCount;
  }
  return kIsaCount;
}

bool takes(const Op& op, const GemmShape& shape) { return plausible(shape) && op.supported(shape); }

}  // namespace

bool plausible(const GemmShape& s) {
  constexpr int32_t kMost = INT32_MAX - 1024;  // so that rounding up stays in range
  if (s.m < 0 || s.n < 1 || s.k < 1 || s.n > kMost || s.k > kMost) return false;
  if (s.group_size < 0 || (s.group_size && s.k % s.group_size)) return false;
  if (s.dtype < kFloat16 || s.dtype > kFloat32) return false;
  return s.norm_epsilon >= 0 && s.norm_epsilon <= FLT_MAX;
}

size_t workspace_of(const Op& op, const GemmShape& shape) {
  return takes(op, shape) ? op.workspace(shape) : 0;
}

int tactics_of(const Op& op, const GemmShape& shape, int32_t* tactics, int capacity) {
  if (!takes(op, shape)) return 0;
  int count = 0;
  for (int isa = best_isa(); isa >= kPortable && count < capacity; --isa) {
    if (op.run[isa]) tactics[count++] = tactic_of(static_cast<Isa>(isa));
  }
  return count;
}

const char* kernel_name(int32_t tactic) {
  for (int isa = kPortable; isa < kIsaCount; ++isa) {
    if (tactic == tactic_of(static_cast<Isa>(isa))) return name_of(static_cast<Isa>(isa));
  }
  return "?";
}

int run_op(const Op& op, const GemmShape& shape, const GemmBuffers& b, void* parallel) {
  if (!takes(op, shape)) return kInvalid;
  int isa = kIsaCount;
  if (shape.tactic != 0) {
    isa = isa_of(op, shape.tactic);
  } else if (chosen_isa().error.empty()) {
    isa = chosen_isa().isa;
  }
  if (isa == kIsaCount) return kInvalid;
  if (shape.m == 0) return 0;
  if (!b.x || !b.y || !b.workspace || !op.has_inputs(shape, b)) return kInvalid;
  if (shape.norm_epsilon > 0 && !b.gamma) return kInvalid;
  const Parallel serial{run_serially, nullptr, 1};
  op.run[isa](shape, b, parallel ? *static_cast<const Parallel*>(parallel) : serial);
  return 0;
}

}  // namespace anybit::cpu
