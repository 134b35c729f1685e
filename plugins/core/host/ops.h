// The table of ops: each op's launch.cu adds a row, anybit_ops() shows them all.
#pragma once
#include <cstring>

#include "core/host/params.h"

namespace anybit {

// Adds an op to the table, where it stays as long as the library does. One static object each.
struct OpRegistration {
  explicit OpRegistration(const AnybitOp& op);
};

// The op of this name, or null.
inline const AnybitOp* find_op(const char* name) {
  const AnybitOp* ops = nullptr;
  const int count = anybit_ops(&ops);
  for (int i = 0; i < count; ++i) {
    if (std::strcmp(ops[i].name, name) == 0) return &ops[i];
  }
  return nullptr;
}

}  // namespace anybit
