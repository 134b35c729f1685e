// What is asked of an engine, and what it answers.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "anybit/sampling.hpp"

#pragma GCC visibility push(default)
namespace anybit {

// One new token.
struct Token {
  int32_t id = 0;
  // The text that may be shown by now: whole characters, and nothing that may turn out to be the
  // beginning of a stop string. Often a word, often "".
  std::string text;
  // Natural logarithm of the token's odds at temperature 1, after bias and penalties; only where
  // Sampling::logprobs is not negative, else 0.
  float logprob = 0;
  // The Sampling::logprobs best tokens and their log probabilities, the best first.
  std::vector<std::pair<int32_t, float>> top;
};

// Why a request ended.
enum class Reason {
  stop,       // an end token of the model, a stop token or a stop string
  length,     // max_new_tokens, or the context is full
  cancelled,  // Handle::cancel(), or the engine was destroyed
  error,      // a step failed; Finish::detail says why
};

// "stop", "length", "cancelled" or "error".
const char* name(Reason reason);

// How a request ended.
struct Finish {
  Reason reason = Reason::error;
  // The stop string that was found, or what went wrong.
  std::string detail;
  // Text that was held back and may be shown now, as no stop string came of it. It follows the text
  // of the last token.
  std::string text;
  int prompt_tokens = 0;
  // Of these, tokens that were in the cache already.
  int cached_tokens = 0;
  // New tokens, an end or stop token not counted.
  int completion_tokens = 0;
  // Seconds from submit() to the first call of the model, from there to the first token, and from
  // there to the end.
  double queued_s = 0, prefill_s = 0, decode_s = 0;
};

// A text to continue.
struct Request {
  // The prompt, special tokens included.
  std::vector<int32_t> tokens;
  // The prompt as text, where `tokens` is empty; the special tokens that the model expects in front
  // are added.
  std::string text;
  // Most new tokens, at least 1. Generation also ends where the context is full.
  int max_new_tokens = 128;
  Sampling sampling;
  // Generation ends where one of these appears in the new text; it is not shown.
  std::vector<std::string> stop;
  // Generation ends at these as it does at the model's end tokens.
  std::vector<int32_t> stop_tokens;
  // Go on behind the model's end tokens.
  bool ignore_end = false;
  // Called for each token, and once at the end, on the engine's thread: nothing else is computed
  // meanwhile, so they must not block. They may call Handle::cancel() and Engine::submit(), and must
  // not wait for the engine. An exception out of on_token ends this request with Reason::error; one
  // out of on_finish is dropped.
  std::function<void(const Token&)> on_token;
  std::function<void(const Finish&)> on_finish;
};

// A request that an engine has taken. Cheap to copy; every function may be called from any thread,
// also when the engine is gone.
class Handle {
 public:
  // A handle of nothing, to be assigned to.
  Handle() = default;

  // Ends the request before its next token; a finished one stays as it is.
  void cancel();

  // Waits for the end; on_finish has returned by then. Throws Error on the engine's own thread,
  // which would wait for itself.
  Finish wait() const;

  // Whether it has ended.
  bool done() const;

  // Counts up from 1 within an engine; 0 of nothing.
  uint64_t id() const;

  struct State;
  explicit Handle(std::shared_ptr<State> state) : state_(std::move(state)) {}

 private:
  std::shared_ptr<State> state_;
};

}  // namespace anybit
#pragma GCC visibility pop
