// What opening a backend gives the model.
#pragma once
#include <memory>
#include <string>

#include "anybit/model.hpp"
#include "backend.hpp"

namespace anybit {

struct Opened {
  std::unique_ptr<Backend> backend;
  std::string name;  // for the card
  int max_context = 0, chunk = 0, threads = 0;
  size_t token_bytes = 0;  // of the cache of one token
  MemoryPlan memory;
};

// Throws Unavailable: the plan needs more than its limit; Error where the user set that limit.
void check_plan(const MemoryPlan& plan, const LoadOptions& options);

}  // namespace anybit
