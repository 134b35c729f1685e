// Runs many requests at once on one model.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "anybit/error.hpp"
#include "anybit/model.hpp"
#include "anybit/request.hpp"

#pragma GCC visibility push(default)
namespace anybit {

// submit() found as many requests waiting as may wait. Try again later.
class QueueFull : public Error {
 public:
  using Error::Error;
};

// submit() came after drain().
class Draining : public Error {
 public:
  using Error::Error;
};

// submit() came after a failure that no later call can mend, such as a lost GPU.
class Lost : public Error {
 public:
  using Error::Error;
};

struct EngineOptions {
  // Most requests that wait for a slot; 0 takes one only where a slot is free.
  size_t queue = 256;
  // A request whose prompt begins like what a free slot holds takes that slot and computes the rest
  // only.
  bool reuse_prefixes = true;
};

// What an engine is doing, and has done since it began.
struct Stats {
  size_t queued = 0, running = 0, slots = 0;
  // Tokens in the caches of running requests, and the most that all slots hold.
  uint64_t cache_tokens = 0, cache_capacity = 0;
  // Prompt tokens computed, taken from a cache, and new tokens.
  uint64_t prompt_tokens = 0, cached_tokens = 0, completion_tokens = 0;
  // Requests that ended, by Reason.
  uint64_t stopped = 0, full = 0, cancelled = 0, failed = 0;
  // Calls of the model, and the seconds in them and in the engine's own work around them.
  uint64_t steps = 0;
  double model_s = 0, engine_s = 0;
  // Why no request can run any more; "" while they can.
  std::string lost;
};

// Runs requests on one model with a thread of its own: they join and leave between two calls of the
// model, and long prompts are computed in chunks beside running ones.
class Engine {
 public:
  // Throws Error where the model has an engine already, or an option is out of range.
  explicit Engine(std::shared_ptr<Model> model, EngineOptions options = {});

  // Cancels what waits and runs; every on_finish has returned by the end. Not for callbacks.
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // Takes a request. Safe on any thread; returns at once.
  //
  // Throws Error: the prompt is empty or too long, has ids outside the vocabulary, or an option is
  // out of range. QueueFull, Draining, Lost. Nothing of the request is called then.
  Handle submit(Request request);

  // Safe on any thread.
  Stats stats() const;

  // Takes nothing new; returns when all requests have ended. Not for callbacks.
  void drain();

  const std::shared_ptr<Model>& model() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace anybit
#pragma GCC visibility pop
