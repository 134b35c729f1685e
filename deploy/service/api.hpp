// OpenAI's API as data: request bodies to calls of the engine, and tokens to answers.
#pragma once
#include <anybit/engine.hpp>
#include <cstdint>
#include <ctime>
#include <string>
#include <string_view>
#include <vector>

#include "service/json.hpp"

namespace anybit::service {

enum class Endpoint { completions, chat };

// Bounds of one call.
struct CallLimits {
  int max_tokens = 0;  // most new tokens of a choice; 0: the context
  int choices = 16;    // most texts of one request: prompts times n
};

// What a request asks for.
struct Call {
  Endpoint endpoint = Endpoint::completions;
  std::vector<std::vector<int32_t>> prompts;
  int n = 1;  // choices of each prompt
  int max_new_tokens = 16;
  Sampling sampling;
  bool seeded = false;  // the request says with which seed
  std::vector<std::string> stop;
  std::vector<int32_t> stop_tokens;
  bool ignore_end = false;
  bool stream = false, include_usage = false;

  // What the engine is asked for one choice, but for the callbacks. With a seed of the request the
  // first choice of each prompt draws with the seed itself, whatever other prompts stand beside it,
  // and others with seeds made of it; without one no two choices share a seed.
  Request request(size_t choice) const;
};

// Reads a body. Runs on any thread.
//
// @param served the name that clients call the model by.
// Throws ApiError, with the field.
Call read_call(Endpoint endpoint, std::string_view body, const Model& model,
               const std::string& served, const CallLimits& limits);

// The tokens of /tokenize, and the text of /detokenize, as answers. Throws ApiError.
Ordered tokenize(std::string_view body, const Model& model);
Ordered detokenize(std::string_view body, const Model& model);

// The model as /v1/models lists it.
Ordered model_entry(const Model& model, const std::string& served, std::time_t created);

// An error of the engine's library.
ApiError api_error(const Error& error, int status = 400, const std::string& code = "invalid_value",
                   const std::string& param = "");

// Makes the answers to one call.
class Answers {
 public:
  Answers(const Call& call, const Model& model, std::string served, const std::string& request_id);

  // The first event of a choice of a chat, which says who speaks; "" of a completion.
  std::string opening(size_t choice) const;
  // An event of new text. Of a token that shows no text and whose odds nobody asked for, "".
  std::string event(size_t choice, const Token& token);
  // The last event of a choice.
  std::string closing(size_t choice, const Finish& finish) const;
  // The event of all tokens, where it was asked for, and the end of the stream.
  std::string end(const std::vector<Finish>& finishes) const;
  static std::string error_event(const ApiError& error);

  // The whole answer of a request that is not streamed, as JSON. Runs on any thread.
  //
  // @param tokens of each choice, where odds were asked for.
  std::string whole(const std::vector<std::string>& texts,
                    const std::vector<std::vector<Token>>& tokens,
                    const std::vector<Finish>& finishes);

 private:
  Ordered envelope(bool chunk) const;
  Ordered chunk(Ordered choice) const;
  Ordered choice(size_t index, const std::string& text, Ordered logprobs, Ordered reason,
                 bool chunk) const;
  Ordered usage(const std::vector<Finish>& finishes) const;
  Ordered logprobs(size_t choice, const std::vector<Token>& tokens);
  Ordered token_entry(int32_t id, float logprob) const;
  std::string token_name(int32_t id) const;

  const Call& call_;
  const Tokenizer& tokenizer_;
  std::string id_, served_, fingerprint_;
  std::time_t created_;
  std::vector<size_t>
      offsets_;  // characters of each choice that are out, where odds were asked for
};

}  // namespace anybit::service
