// What a model is made of, for the engine and for tests that bring a backend of their own.
#pragma once
#include <atomic>
#include <memory>
#include <optional>
#include <string>

#include "anybit/model.hpp"
#include "backend.hpp"

namespace anybit {

// Something that may be missing, and why it is.
template <class T>
struct Maybe {
  std::optional<T> value;
  std::optional<Error> error;

  const T& get() const {
    if (value) return *value;
    throw error ? *error : Error("model", "got nothing, expected a loaded part", "Load it first");
  }
};

struct Model::Parts {
  Card card;
  int chunk = 256;
  size_t token_bytes = 0;  // of the cache of one token
  Maybe<Tokenizer> tokenizer;
  Maybe<ChatTemplate> chat;
  std::unique_ptr<Backend> backend;
  std::atomic<bool> taken{false};  // by an engine
};

}  // namespace anybit
