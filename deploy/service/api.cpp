// Which fields there are, what each means, and the objects that go back.
#include "service/api.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>

namespace anybit::service {
namespace {

constexpr double kLogprobFloor = -9999.0;  // stands for odds of 0, as JSON has no infinity
constexpr size_t kMostStops = 16, kMostBias = 1024;
constexpr int kMostTop = 20;
constexpr int64_t kMostOdds = 1 << 18;  // in an answer that is put together in memory

uint64_t mixed(uint64_t x) {  // the finalizer of SplitMix64
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

uint64_t any_seed() {
  std::random_device device;
  return uint64_t{device()} << 32 | device();
}

void read_bias(Fields& fields, int vocab, Sampling& sampling) {
  const Json* bias = fields.find("logit_bias");
  if (!bias) return;
  if (!bias->is_object() || bias->size() > kMostBias) {
    throw bad_request("logit_bias",
                      "got " + shown(*bias) + ", expected an object of at most " +
                          std::to_string(kMostBias) + " token ids and numbers",
                      "Give one, such as {\"42\": -100}, or leave the field out");
  }
  Fields entries(*bias, "logit_bias.");
  for (const auto& [key, value] : bias->items()) {
    const bool digits =
        !key.empty() && key.size() < 10 && (key[0] != '0' || key == "0") &&
        std::all_of(key.begin(), key.end(), [](char c) { return c >= '0' && c <= '9'; });
    if (!digits || std::stoi(key) >= vocab) {
      throw bad_request("logit_bias",
                        "got the key " + shown(key) + ", expected a token id of 0 to " +
                            std::to_string(vocab - 1),
                        "Ask /tokenize for the ids of a text");
    }
    if (const auto number = entries.number(key, -100, 100)) {
      sampling.logit_bias.emplace_back(std::stoi(key), static_cast<float>(*number));
    }
  }
}

// As the model's makers want it, where the request does not say.
Sampling read_sampling(Fields& fields, const Card& card, bool& seeded) {
  Sampling s = card.sampling;
  const auto take = [&fields](const char* name, double least, double most, float& into) {
    if (const auto value = fields.number(name, least, most)) into = static_cast<float>(*value);
  };
  take("temperature", 0, 100, s.temperature);
  take("top_p", 0, 1, s.top_p);
  s.top_p = std::max(s.top_p, std::numeric_limits<float>::min());  // 0 leaves the best one
  take("min_p", 0, 1, s.min_p);
  take("repetition_penalty", 0.01, 100, s.repetition_penalty);
  take("presence_penalty", -2, 2, s.presence_penalty);
  take("frequency_penalty", -2, 2, s.frequency_penalty);
  if (const auto k = fields.whole("top_k", -1, INT32_MAX))
    s.top_k = std::max<int>(0, static_cast<int>(*k));
  const auto seed = fields.whole("seed", INT64_MIN, INT64_MAX);
  seeded = seed.has_value();
  s.seed = seed ? static_cast<uint64_t>(*seed) : any_seed();
  read_bias(fields, card.vocab, s);
  return s;
}

const char* role_of(const std::string& role) {
  return role == "developer" ? "system" : role.c_str();  // its newer name
}

std::string content_of(Fields& message) {
  const Json* content = message.find("content");
  if (!content) return "";
  if (content->is_string()) return content->get<std::string>();
  const auto wrong = [&](const Json& got) {
    return bad_request(message.path("content"),
                       "got " + shown(got) +
                           ", expected text, or a list of parts "
                           "of type text",
                       "Leave out images, sound and files: this server reads text");
  };
  if (!content->is_array()) throw wrong(*content);
  std::string text;
  for (const Json& part : *content) {
    if (!part.is_object() || part.value("type", Json()) != "text") throw wrong(part);
    const auto found = part.find("text");
    if (found == part.end() || !found->is_string()) throw wrong(part);
    text += found->get_ref<const std::string&>();
  }
  return text;
}

std::vector<Message> read_messages(Fields& fields) {
  const Json* list = fields.find("messages");
  if (!list || !list->is_array() || list->empty()) {
    throw bad_request("messages",
                      "got " + (list ? shown(*list) : "none") + ", expected a list of messages",
                      "Give at least one, such as {\"role\": \"user\", \"content\": \"Hello\"}",
                      list ? "invalid_value" : "missing_required_parameter");
  }
  std::vector<Message> messages;
  for (size_t i = 0; i < list->size(); ++i) {
    const std::string where = "messages[" + std::to_string(i) + "]";
    const Json& one = (*list)[i];
    if (!one.is_object()) {
      throw bad_request(where, "got " + shown(one) + ", expected an object",
                        "Give role and content");
    }
    Fields message(one, where + ".");
    const auto role = message.text("role");
    if (!role) {
      throw bad_request(where + ".role", "got none, expected one", "Say who speaks, such as user",
                        "missing_required_parameter");
    }
    message.only("tool_calls", Json::array(), "Leave it out: this server calls no tools");
    message.only("function_call", nullptr, "Leave it out: this server calls no functions");
    message.ignore({"name", "refusal", "annotations", "audio"});
    if (*role != "assistant" && !message.find("content")) {
      throw bad_request(where + ".content", "got none, expected text",
                        "Say something, or leave the message out", "missing_required_parameter");
    }
    const std::string content = content_of(message);
    message.refuse_others();
    messages.push_back({role_of(*role), content});
  }
  return messages;
}

std::vector<int32_t> chat_tokens(const std::vector<Message>& messages, bool generation_prompt,
                                 const Model& model) {
  try {
    // Special tokens are the template's: in a content they would let its writer speak as another.
    const Prompt prompt = model.chat().prompt(messages, generation_prompt);
    return model.tokenizer().encode(prompt.text, prompt.contents);
  } catch (const Error& error) {
    throw api_error(error, 400, "chat_template", "messages");
  }
}

std::vector<int32_t> text_tokens(const std::string& text, bool special, const Model& model) {
  try {
    return model.tokenizer().encode(text, special);
  } catch (const Error& error) {
    throw api_error(error, 400, "invalid_value", "prompt");
  }
}

// A text, several, a list of tokens, or several.
std::vector<std::vector<int32_t>> read_prompts(Fields& fields, const Model& model, size_t most) {
  const Json* prompt = fields.find("prompt");
  const auto wrong = [prompt](const std::string& got) {
    return bad_request("prompt",
                       "got " + got + ", expected a text, a list of token ids, or a list of either",
                       "Give one", prompt ? "invalid_value" : "missing_required_parameter");
  };
  if (!prompt) throw wrong("none");
  const int vocab = model.card().vocab;
  if (prompt->is_string()) return {text_tokens(prompt->get<std::string>(), true, model)};
  if (!prompt->is_array() || prompt->empty()) throw wrong(shown(*prompt));
  if (prompt->front().is_number()) return {token_ids(*prompt, "prompt", vocab)};
  if (prompt->size() > most) {
    throw bad_request("prompt",
                      "got " + std::to_string(prompt->size()) + " texts, expected at most " +
                          std::to_string(most),
                      "Send several requests");
  }
  std::vector<std::vector<int32_t>> prompts;
  for (const Json& one : *prompt) {
    if (one.is_string()) {
      prompts.push_back(text_tokens(one.get<std::string>(), true, model));
    } else if (one.is_array()) {
      prompts.push_back(token_ids(one, "prompt", vocab));
    } else {
      throw wrong(shown(one));
    }
  }
  return prompts;
}

void check_model(Fields& fields, const std::string& served) {
  const auto name = fields.text("model");
  if (!name || *name == served) return;
  throw ApiError(404, "model_not_found",
                 "model: got " + shown(*name) + ", expected " + served +
                     ". Give that name, or leave the field out.",
                 "model");
}

// Fields that would change the answer in a way that is not there, but for values that change nothing.
void refuse_what_is_not_there(Fields& fields) {
  const char* tools = "Leave it out: this server calls no tools";
  for (const char* name : {"tools", "functions"}) fields.only(name, Json::array(), tools);
  for (const char* name : {"tool_choice", "function_call"}) fields.only(name, "none", tools);
  if (const Json* format = fields.find("response_format");
      format && *format != Json{{"type", "text"}}) {
    throw bad_request("response_format", "got " + shown(*format) + ", expected {\"type\":\"text\"}",
                      "Leave it out: this server does not constrain the text", "unsupported_value");
  }
  fields.only("modalities", Json{"text"}, "Leave it out: this server writes text");
  fields.only("audio", nullptr, "Leave it out: this server writes text");
  fields.only("web_search_options", nullptr, "Leave it out: this server does not search");
  fields.only("moderation", nullptr, "Leave it out: this server does not judge texts");
  fields.only("suffix", "", "Leave it out: this server continues a text, and does not fill gaps");
  fields.only("echo", false, "Leave it out, and put the prompt in front yourself");
}

// The new tokens of each choice: as asked, within the limits, and no more than the context has left.
int read_max_tokens(Fields& fields, Call& call, const Card& card, const CallLimits& limits) {
  const int most = limits.max_tokens ? std::min(limits.max_tokens, card.max_context) : INT32_MAX;
  const auto older = fields.whole("max_tokens", 1, most);
  const auto newer = fields.whole("max_completion_tokens", 1, most);
  if (newer) return static_cast<int>(*newer);
  if (older) return static_cast<int>(*older);
  if (call.endpoint == Endpoint::completions) return std::min(16, most);  // OpenAI's default
  return std::min(card.max_context, most);
}

}  // namespace

Request Call::request(size_t choice) const {
  Request request;
  request.tokens = prompts[choice / static_cast<size_t>(n)];
  request.max_new_tokens = max_new_tokens;
  request.sampling = sampling;
  const size_t draw = seeded ? choice % static_cast<size_t>(n) : choice;
  if (draw) request.sampling.seed = mixed(sampling.seed ^ mixed(draw));
  request.stop = stop;
  request.stop_tokens = stop_tokens;
  request.ignore_end = ignore_end;
  return request;
}

Call read_call(Endpoint endpoint, std::string_view body, const Model& model,
               const std::string& served, const CallLimits& limits) {
  const Json object = parse_object(body);
  const Card& card = model.card();
  Fields fields(object);
  check_model(fields, served);
  Call call;
  call.endpoint = endpoint;
  call.sampling = read_sampling(fields, card, call.seeded);
  call.max_new_tokens = read_max_tokens(fields, call, card, limits);
  call.n = static_cast<int>(fields.whole("n", 1, limits.choices).value_or(1));
  call.stop = fields.texts("stop", kMostStops);
  call.stop_tokens = fields.ids("stop_token_ids", card.vocab);
  call.ignore_end = fields.boolean("ignore_eos").value_or(false);
  call.stream = fields.boolean("stream").value_or(false);
  if (const Json* options = fields.find("stream_options")) {
    if (!options->is_object() || !call.stream) {
      throw bad_request("stream_options",
                        "got " + shown(*options) + ", expected an object, and stream true",
                        "Leave it out where nothing is streamed");
    }
    Fields stream(*options, "stream_options.");
    call.include_usage = stream.boolean("include_usage").value_or(false);
    stream.ignore({"include_obfuscation"});
    stream.refuse_others();
  }
  if (endpoint == Endpoint::chat) {
    const bool wanted = fields.boolean("logprobs").value_or(false);
    const auto top = fields.whole("top_logprobs", 0, kMostTop);
    if (top && *top && !wanted) {
      throw bad_request("top_logprobs",
                        "got " + std::to_string(*top) + " without logprobs, expected both",
                        "Add \"logprobs\": true");
    }
    if (wanted) call.sampling.logprobs = static_cast<int>(top.value_or(0));
  } else if (const auto top = fields.whole("logprobs", 0, kMostTop)) {
    call.sampling.logprobs = static_cast<int>(*top);
  }
  if (const auto best = fields.whole("best_of", 1, limits.choices); best && *best != call.n) {
    throw bad_request(
        "best_of", "got " + std::to_string(*best) + ", expected n, " + std::to_string(call.n),
        "Leave it out: this server returns every text that it makes", "unsupported_value");
  }
  refuse_what_is_not_there(fields);
  // Who asks and how it is billed, kept or cached; hints that change no odds.
  fields.ignore({"user", "metadata", "store", "service_tier", "safety_identifier",
                 "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "prediction",
                 "parallel_tool_calls", "reasoning_effort", "verbosity"});
  if (endpoint == Endpoint::chat) {
    const auto messages = read_messages(fields);
    fields.refuse_others();
    call.prompts = {chat_tokens(messages, true, model)};
  } else {
    call.prompts = read_prompts(fields, model, static_cast<size_t>(limits.choices));
    fields.refuse_others();
  }
  const size_t choices = call.prompts.size() * static_cast<size_t>(call.n);
  if (choices > static_cast<size_t>(limits.choices)) {
    throw bad_request("n",
                      "got " + std::to_string(choices) + " texts in all, expected at most " +
                          std::to_string(limits.choices),
                      "Send several requests");
  }
  const char* where = endpoint == Endpoint::chat ? "messages" : "prompt";
  size_t shortest = SIZE_MAX, longest = 0;
  for (const auto& prompt : call.prompts) {
    shortest = std::min(shortest, prompt.size());
    longest = std::max(longest, prompt.size());
  }
  if (shortest == 0) {
    throw bad_request(where, "got no tokens, expected at least one", "Give some text");
  }
  if (longest >= static_cast<size_t>(card.max_context)) {
    throw bad_request(where,
                      "got " + std::to_string(longest) +
                          " tokens, expected fewer than the context of " +
                          std::to_string(card.max_context),
                      "Send a shorter text", "context_length_exceeded");
  }
  call.max_new_tokens = std::min(call.max_new_tokens, card.max_context);
  const int64_t odds =
      static_cast<int64_t>(choices) * call.max_new_tokens * (int64_t{call.sampling.logprobs} + 1);
  if (!call.stream && odds > kMostOdds) {
    throw bad_request("logprobs",
                      "got " + std::to_string(choices) + " texts of up to " +
                          std::to_string(call.max_new_tokens) + " tokens with " +
                          std::to_string(call.sampling.logprobs + 1) +
                          " odds each, expected at most " + std::to_string(kMostOdds) +
                          " odds in an answer that is not streamed",
                      "Ask for fewer tokens or odds, or for a stream");
  }
  return call;
}

Ordered tokenize(std::string_view body, const Model& model) {
  const Json object = parse_object(body);
  Fields fields(object);
  fields.ignore({"model"});
  const bool special = fields.boolean("add_special_tokens").value_or(true);
  const bool generation = fields.boolean("add_generation_prompt").value_or(true);
  std::vector<int32_t> tokens;
  if (fields.find("messages")) {
    tokens = chat_tokens(read_messages(fields), generation, model);
  } else if (const auto prompt = fields.text("prompt")) {
    tokens = text_tokens(*prompt, special, model);
  } else {
    throw bad_request("prompt", "got none, expected a text", "Give prompt, or messages",
                      "missing_required_parameter");
  }
  fields.refuse_others();
  return {
      {"count", tokens.size()}, {"max_model_len", model.card().max_context}, {"tokens", tokens}};
}

Ordered detokenize(std::string_view body, const Model& model) {
  const Json object = parse_object(body);
  Fields fields(object);
  fields.ignore({"model"});
  if (!fields.find("tokens")) {
    throw bad_request("tokens", "got none, expected a list of token ids", "Give one",
                      "missing_required_parameter");
  }
  const auto tokens = fields.ids("tokens", model.card().vocab);
  const bool skip = fields.boolean("skip_special_tokens").value_or(false);
  fields.refuse_others();
  return {{"prompt", model.tokenizer().decode(tokens, skip)}};
}

Ordered model_entry(const Model& model, const std::string& served, std::time_t created) {
  const Card& card = model.card();
  return {
      {"id", served},
      {"object", "model"},
      {"created", created},
      {"owned_by", "anybit"},
      {"max_model_len", card.max_context},
      {"anybit",
       {{"name", card.name},
        {"family", card.family},
        {"bits", card.scheme},
        {"method", card.method},
        {"dtype", card.dtype},
        {"kv_bits", card.kv_bits},
        {"layers", card.layers},
        {"hidden_size", card.hidden},
        {"vocab_size", card.vocab},
        {"context", card.context},
        {"backend", card.backend},
        {"cache", card.cache_form},
        {"slots", card.slots},
        {"threads", card.threads},
        {"proof", card.proof},
        {"weight_bytes", card.memory.weights},
        {"run_bytes", card.memory.total()}}},
  };
}

ApiError api_error(const Error& error, int status, const std::string& code,
                   const std::string& param) {
  return ApiError(status, code, error.what(), param);
}

// ---------------------------------------------------------------- answers

namespace {

constexpr const char* kReplacement = "\xef\xbf\xbd";  // U+FFFD

std::string sse(const std::string& data) { return "data: " + data + "\n\n"; }

size_t characters(const std::string& text) {
  return static_cast<size_t>(
      std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xc0) != 0x80; }));
}

double written(float logprob) { return std::isfinite(logprob) ? logprob : kLogprobFloor; }

std::string reason_of(const Finish& finish) {
  return finish.reason == Reason::stop ? "stop" : "length";
}

}  // namespace

Answers::Answers(const Call& call, const Model& model, std::string served,
                 const std::string& request_id)
    : call_(call),
      tokenizer_(model.tokenizer()),
      id_((call.endpoint == Endpoint::chat ? "chatcmpl-" : "cmpl-") + request_id),
      served_(std::move(served)),
      fingerprint_("anybit-" + model.card().scheme),
      created_(std::time(nullptr)),
      offsets_(call.prompts.size() * static_cast<size_t>(call.n)) {}

Ordered Answers::envelope(bool chunk) const {
  const bool chat = call_.endpoint == Endpoint::chat;
  const char* object = !chat   ? "text_completion"
                       : chunk ? "chat.completion.chunk"
                               : "chat.completion";
  return {{"id", id_},
          {"object", object},
          {"created", created_},
          {"model", served_},
          {"system_fingerprint", fingerprint_}};
}

Ordered Answers::chunk(Ordered choice) const {
  Ordered value = envelope(true);
  value["choices"] = Ordered::array({std::move(choice)});
  if (call_.include_usage) value["usage"] = nullptr;
  return value;
}

Ordered Answers::choice(size_t index, const std::string& text, Ordered logprobs, Ordered reason,
                        bool chunk) const {
  Ordered value{{"index", index}};
  if (call_.endpoint == Endpoint::completions) {
    value["text"] = text;
  } else if (chunk) {
    value["delta"] =
        text.empty() && !reason.is_null() ? Ordered::object() : Ordered{{"content", text}};
  } else {
    value["message"] = {{"role", "assistant"}, {"content", text}, {"refusal", nullptr}};
  }
  value["logprobs"] = std::move(logprobs);
  value["finish_reason"] = std::move(reason);
  return value;
}

std::string Answers::opening(size_t index) const {
  if (call_.endpoint == Endpoint::completions) return "";
  Ordered value = choice(index, "", nullptr, nullptr, true);
  value["delta"] = {{"role", "assistant"}, {"content", ""}};
  return sse(dump(chunk(std::move(value))));
}

std::string Answers::event(size_t index, const Token& token) {
  if (token.text.empty() && call_.sampling.logprobs < 0) return "";
  return sse(dump(chunk(choice(index, token.text, logprobs(index, {token}), nullptr, true))));
}

std::string Answers::closing(size_t index, const Finish& finish) const {
  return sse(dump(chunk(choice(index, finish.text, nullptr, reason_of(finish), true))));
}

std::string Answers::end(const std::vector<Finish>& finishes) const {
  std::string text;
  if (call_.include_usage) {
    Ordered value = envelope(true);
    value["choices"] = Ordered::array();
    value["usage"] = usage(finishes);
    text = sse(dump(value));
  }
  return text + sse("[DONE]");
}

std::string Answers::error_event(const ApiError& error) { return sse(dump(error.json())); }

std::string Answers::whole(const std::vector<std::string>& texts,
                           const std::vector<std::vector<Token>>& tokens,
                           const std::vector<Finish>& finishes) {
  Ordered value = envelope(false), choices = Ordered::array();
  for (size_t i = 0; i < texts.size(); ++i) {
    choices.push_back(choice(i, texts[i] + finishes[i].text, logprobs(i, tokens[i]),
                             reason_of(finishes[i]), false));
  }
  value["choices"] = std::move(choices);
  value["usage"] = usage(finishes);
  return dump(value);
}

// A prompt counts once, however many choices it has.
Ordered Answers::usage(const std::vector<Finish>& finishes) const {
  int64_t prompt = 0, cached = 0, completion = 0;
  for (size_t i = 0; i < finishes.size(); ++i) {
    completion += finishes[i].completion_tokens;
    if (i % static_cast<size_t>(call_.n)) continue;
    prompt += finishes[i].prompt_tokens;
    cached += finishes[i].cached_tokens;
  }
  return {{"prompt_tokens", prompt},
          {"completion_tokens", completion},
          {"total_tokens", prompt + completion},
          {"prompt_tokens_details", {{"cached_tokens", cached}}}};
}

Ordered Answers::token_entry(int32_t id, float logprob) const {
  Ordered bytes = Ordered::array();
  for (const char c : tokenizer_.bytes(id)) bytes.push_back(static_cast<unsigned char>(c));
  return {{"token", tokenizer_.decode({id}, false)},
          {"logprob", written(logprob)},
          {"bytes", std::move(bytes)}};
}

// A token as the older endpoint names it, which has no field for bytes: of a part of a character,
// which has no text, bytes:\xe4 and the like, as OpenAI's did.
std::string Answers::token_name(int32_t id) const {
  const std::string text = tokenizer_.decode({id}, false), bytes = tokenizer_.bytes(id);
  if (text.find(kReplacement) == text.npos || bytes.find(kReplacement) != bytes.npos) return text;
  std::string name = "bytes:";
  for (const char byte : bytes) {
    char hex[5];
    std::snprintf(hex, sizeof hex, "\\x%02x", static_cast<unsigned char>(byte));
    name += hex;
  }
  return name;
}

Ordered Answers::logprobs(size_t index, const std::vector<Token>& tokens) {
  if (call_.sampling.logprobs < 0) return nullptr;
  if (call_.endpoint == Endpoint::chat) {
    Ordered content = Ordered::array();
    for (const Token& token : tokens) {
      Ordered entry = token_entry(token.id, token.logprob), top = Ordered::array();
      for (const auto& [id, logprob] : token.top) top.push_back(token_entry(id, logprob));
      entry["top_logprobs"] = std::move(top);
      content.push_back(std::move(entry));
    }
    return {{"content", std::move(content)}, {"refusal", nullptr}};
  }
  Ordered texts = Ordered::array(), odds = Ordered::array(), tops = Ordered::array(),
          places = Ordered::array();
  for (const Token& token : tokens) {
    texts.push_back(token_name(token.id));
    odds.push_back(written(token.logprob));
    Ordered top = Ordered::object();
    for (const auto& [id, logprob] : token.top) {
      top.emplace(token_name(id), written(logprob));  // of two with one name, the likelier
    }
    tops.push_back(std::move(top));
    places.push_back(offsets_[index]);
    offsets_[index] += characters(token.text);
  }
  return {{"tokens", std::move(texts)},
          {"token_logprobs", std::move(odds)},
          {"top_logprobs", call_.sampling.logprobs ? std::move(tops) : Ordered(nullptr)},
          {"text_offset", std::move(places)}};
}

}  // namespace anybit::service
