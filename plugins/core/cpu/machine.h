// What the process may take of the machine, as plugins/cores.py says it.
#pragma once
#include <cstddef>
#include <filesystem>

namespace anybit::cpu {

// Where the kernel shows processes and control groups, of either version.
struct Machine {
  std::filesystem::path proc = "/proc", control = "/sys/fs/cgroup";
};

// Cores that the process may run on, at most as many as its control groups give it time for (a share
// of a core counts as a whole one), and at least one.
int usable_cores(const Machine& machine = {});

// Bytes that the process may still take: what the machine has, at most what each of its control
// groups leaves. Pages of files that are not in use count as free.
size_t free_memory(const Machine& machine = {});

}  // namespace anybit::cpu
