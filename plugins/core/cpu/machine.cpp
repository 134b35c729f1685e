// Asks the kernel; a limit of any control group above the process counts.
#include "core/cpu/machine.h"

#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <fstream>
#include <limits>
#include <optional>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

namespace anybit::cpu {
namespace {

namespace fs = std::filesystem;

constexpr auto kAll = std::numeric_limits<size_t>::max();

// A number at the beginning of a file; none where there is no such file or it has a word.
std::optional<size_t> number_in(const fs::path& path) {
  std::ifstream file(path);
  if (int64_t number = 0; file >> number && number >= 0) return static_cast<size_t>(number);
  return std::nullopt;
}

// The number behind a name in a file of such lines.
std::optional<size_t> number_of(const fs::path& path, const std::string& name) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string first;
    size_t number = 0;
    if (words >> first >> number && first == name) return number;
  }
  return std::nullopt;
}

struct Group {
  fs::path folder;
  bool second;  // version
};

// The process's control group for a controller and those above it.
std::vector<Group> groups(const Machine& machine, const std::string& controller) {
  std::vector<Group> found;
  std::ifstream file(machine.proc / "self" / "cgroup");
  for (std::string line; std::getline(file, line);) {
    const size_t names_at = line.find(':') + 1, path_at = line.find(':', names_at) + 1;
    if (names_at == 0 || path_at == 0) continue;
    const std::string names = line.substr(names_at, path_at - 1 - names_at);
    const bool second = names.empty();  // which names none
    if (!second && ("," + names + ",").find("," + controller + ",") == std::string::npos) continue;
    const fs::path root = second ? machine.control : machine.control / controller;
    fs::path own = fs::path(line.substr(path_at)).relative_path();
    for (;; own = own.parent_path()) {
      found.push_back({root / own, second});
      if (own.empty()) break;
    }
  }
  return found;
}

}  // namespace

int usable_cores(const Machine& machine) {
  size_t cores = std::max(1u, std::thread::hardware_concurrency());
#if defined(__linux__)
  cpu_set_t bound;
  if (sched_getaffinity(0, sizeof bound, &bound) == 0) {
    cores = static_cast<size_t>(CPU_COUNT(&bound));
  }
#endif
  for (const Group& group : groups(machine, "cpu")) {
    std::optional<size_t> quota, period;
    if (group.second) {
      std::ifstream file(group.folder / "cpu.max");
      size_t limit = 0, of = 0;
      if (file >> limit >> of) quota = limit, period = of;
    } else {
      quota = number_in(group.folder / "cpu.cfs_quota_us");
      period = number_in(group.folder / "cpu.cfs_period_us");
    }
    if (quota && period && *period > 0) {
      cores = std::min(cores, *quota / *period + (*quota % *period > 0));
    }
  }
  return static_cast<int>(std::max<size_t>(cores, 1));
}

size_t free_memory(const Machine& machine) {
  const auto available = number_of(machine.proc / "meminfo", "MemAvailable:");
  size_t free = available ? *available << 10 : kAll;
  for (const Group& group : groups(machine, "memory")) {
    const fs::path& folder = group.folder;
    const auto limit = number_in(folder / (group.second ? "memory.max" : "memory.limit_in_bytes"));
    const auto used =
        number_in(folder / (group.second ? "memory.current" : "memory.usage_in_bytes"));
    if (!limit || !used) continue;
    const size_t files =
        number_of(folder / "memory.stat", group.second ? "inactive_file" : "total_inactive_file")
            .value_or(0);
    const size_t taken = *used - std::min(*used, files);
    free = std::min(free, *limit - std::min(*limit, taken));
  }
  return free;
}

}  // namespace anybit::cpu
