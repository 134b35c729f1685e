// The table of ops of this library. Compiles with nvcc and with g++.
#include "core/host/ops.h"

#include <algorithm>
#include <vector>

namespace {

// A function's static, so that it exists before the first registration whatever the order of the
// op folders.
std::vector<AnybitOp>& table() {
  static std::vector<AnybitOp> ops;
  return ops;
}

bool comes_before(const AnybitOp& a, const AnybitOp& b) { return std::strcmp(a.name, b.name) < 0; }

}  // namespace

anybit::OpRegistration::OpRegistration(const AnybitOp& op) {
  std::vector<AnybitOp>& ops = table();
  ops.insert(std::upper_bound(ops.begin(), ops.end(), op, comes_before), op);
}

int anybit_ops(const AnybitOp** ops) {
  *ops = table().data();
  return static_cast<int>(table().size());
}
