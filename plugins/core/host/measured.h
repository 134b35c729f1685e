// Kernels that were measured to be fastest on a GPU, in the place of the rules of config.h.
#pragma once
#include <cstring>

#include "core/host/config.h"

namespace anybit {

// Symmetric activations and the type of x are no part of it: the bytes of the weights, which
// decide, are the same, and symmetric codes only save a little arithmetic. A kernel that cannot run
// a type (A16 in fp32) is not taken.
struct Measured {
  int sm, multiprocessors;  // of the GPU
  const char* op;
  int wbits, levels, abits, group_size, n, k;
  int m;  // tokens that were timed; the row serves down to the next smaller one
  const char* kernel;
  int shares;
};

constexpr Measured kMeasured[] = {
#include "core/host/measured.inc"
    {},  // ends the list
};

// tokens from which on a measurement holds for any more: tiles are full
constexpr int kManyTokens = 1024;

// The row for this shape and GPU, or null: what is fastest for few tokens says nothing about many.
inline const Measured* find_measured(const Measured* rows, const char* op, const GemmShape& s,
                                     const Device& device) {
  const Measured* best = nullptr;
  for (const Measured* row = rows; row->op; ++row) {
    const bool same = row->sm == device.sm && row->multiprocessors == device.multiprocessors &&
                      row->n == s.n && row->k == s.k && row->wbits == s.wbits &&
                      row->levels == s.levels && row->abits == s.abits &&
                      row->group_size == s.group_size;
    if (!same || std::strcmp(row->op, op) != 0) continue;
    const bool holds = row->m >= s.m;
    if (!best || (holds ? best->m < s.m || row->m < best->m : best->m < s.m && row->m > best->m))
      best = row;
  }
  return best && best->m < s.m && best->m < kManyTokens ? nullptr : best;
}

}  // namespace anybit
