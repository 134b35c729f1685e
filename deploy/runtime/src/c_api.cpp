// The C interface over the C++ one.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <nlohmann/json.hpp>

#include "anybit/anybit.h"
#include "anybit/anybit.hpp"

struct anybit_engine {
  std::shared_ptr<anybit::Model> model;
  anybit::Engine engine;
};

struct anybit_handle {
  anybit::Handle handle;
};

namespace {

char* copy(const std::string& text) {
  auto* made = static_cast<char*>(malloc(text.size() + 1));
  if (made) memcpy(made, text.c_str(), text.size() + 1);
  return made;
}

// What `work` returns, or `failed` and the reason.
template <class Result, class Work>
Result guarded(Result failed, char** error, Work work) noexcept {
  if (error) *error = nullptr;
  try {
    return work();
  } catch (const std::exception& problem) {
    if (error) *error = copy(problem.what());
  } catch (...) {
    if (error) *error = copy("anybit: got an unknown exception, expected none. Report it.");
  }
  return failed;
}

constexpr size_t kLargest = 4096;  // of a structure; more is no size

// Sets up a caller's structure, which may be of an older version or a later one.
template <class T>
void write(T* to, size_t size, const T& defaults) {
  if (!to || size < sizeof to->size || size > kLargest) return;
  memset(static_cast<void*>(to), 0, size);
  memcpy(static_cast<void*>(to), &defaults, std::min(size, sizeof(T)));
  to->size = size;
}

// What a caller's structure, which may be of an older version, says over the defaults.
template <class T>
T read(const T* given, T defaults) {
  if (!given) return defaults;
  if (given->size < sizeof given->size || given->size > kLargest) {
    throw anybit::Error(
        "size", "got " + std::to_string(given->size) + ", expected " + std::to_string(sizeof(T)),
        "Set the structure up with its init function");
  }
  memcpy(&defaults, given, std::min(given->size, sizeof(T)));
  return defaults;
}

std::string text(const char* given) { return given ? given : ""; }

void check(const void* pointer, const char* name) {
  if (!pointer) throw anybit::Error(name, "got null, expected one", "Pass what was opened");
}

template <class T>
void check_list(const T* given, size_t count, const char* name) {
  if (given || count == 0) return;
  throw anybit::Error(name, "got null for " + std::to_string(count) + " of them, expected a list",
                      "Pass a list of that many, or 0");
}

template <class T>
std::vector<T> list(const T* given, size_t count, const char* name) {
  check_list(given, count, name);
  return std::vector<T>(given, given + count);
}

anybit_request request_defaults(const anybit::Sampling& sampling) {
  anybit_request made{};
  made.size = sizeof made;
  made.max_new_tokens = anybit::Request().max_new_tokens;
  made.temperature = sampling.temperature;
  made.top_p = sampling.top_p;
  made.min_p = sampling.min_p;
  made.top_k = sampling.top_k;
  made.repetition_penalty = sampling.repetition_penalty;
  made.logprobs = sampling.logprobs;
  return made;
}

anybit_options option_defaults() {
  const anybit::LoadOptions load;
  const anybit::EngineOptions engine;
  anybit_options made{};
  made.size = sizeof made;
  made.slots = load.slots;
  made.threads = load.threads;
  made.capacity = load.capacity;
  made.chunk = load.chunk;
  made.queue = engine.queue;
  made.reuse_prefixes = engine.reuse_prefixes;
  made.cuda_graphs = load.cuda_graphs;
  return made;
}

anybit_finish finish_of(const anybit::Finish& finish) {
  anybit_finish made{};
  made.size = sizeof made;
  made.reason = static_cast<int>(finish.reason);
  made.prompt_tokens = finish.prompt_tokens;
  made.cached_tokens = finish.cached_tokens;
  made.completion_tokens = finish.completion_tokens;
  made.queued_s = finish.queued_s;
  made.prefill_s = finish.prefill_s;
  made.decode_s = finish.decode_s;
  return made;
}

static_assert(int(anybit::Reason::stop) == ANYBIT_STOP &&
              int(anybit::Reason::length) == ANYBIT_LENGTH &&
              int(anybit::Reason::cancelled) == ANYBIT_CANCELLED &&
              int(anybit::Reason::error) == ANYBIT_ERROR);

anybit::Request request_of(const anybit_request& given) {
  anybit::Request made;
  made.tokens = list(given.tokens, given.token_count, "tokens");
  made.text = text(given.text);
  made.max_new_tokens = given.max_new_tokens;
  made.sampling.temperature = given.temperature;
  made.sampling.top_p = given.top_p;
  made.sampling.min_p = given.min_p;
  made.sampling.top_k = given.top_k;
  made.sampling.repetition_penalty = given.repetition_penalty;
  made.sampling.presence_penalty = given.presence_penalty;
  made.sampling.frequency_penalty = given.frequency_penalty;
  check_list(given.bias_tokens, given.bias_count, "bias_tokens");
  check_list(given.biases, given.bias_count, "biases");
  for (size_t i = 0; i < given.bias_count; ++i) {
    made.sampling.logit_bias.emplace_back(given.bias_tokens[i], given.biases[i]);
  }
  made.sampling.seed = given.seed;
  made.sampling.logprobs = given.logprobs;
  check_list(given.stop, given.stop_count, "stop");
  for (size_t i = 0; i < given.stop_count; ++i) made.stop.push_back(text(given.stop[i]));
  made.stop_tokens = list(given.stop_tokens, given.stop_token_count, "stop_tokens");
  made.ignore_end = given.ignore_end != 0;
  void* user = given.user;
  if (const anybit_on_token call = given.on_token) {
    made.on_token = [call, user](const anybit::Token& token) {
      call(user, token.id, token.text.c_str(), token.text.size(), token.logprob);
    };
  }
  if (const anybit_on_finish call = given.on_finish) {
    made.on_finish = [call, user](const anybit::Finish& finish) {
      const anybit_finish shown = finish_of(finish);
      call(user, &shown, finish.detail.c_str(), finish.text.c_str(), finish.text.size());
    };
  }
  return made;
}

std::string json_of(const anybit::Card& card) {
  const nlohmann::json made{{"name", card.name},
                            {"family", card.family},
                            {"scheme", card.scheme},
                            {"method", card.method},
                            {"dtype", card.dtype},
                            {"kv_bits", card.kv_bits},
                            {"layers", card.layers},
                            {"hidden", card.hidden},
                            {"vocab", card.vocab},
                            {"context", card.context},
                            {"max_context", card.max_context},
                            {"end_tokens", card.end_tokens},
                            {"backend", card.backend},
                            {"choice", card.choice},
                            {"cache_form", card.cache_form},
                            {"slots", card.slots},
                            {"threads", card.threads},
                            {"verified", card.verified},
                            {"proof", card.proof},
                            {"memory", card.memory.text()}};
  return made.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

std::string json_of(const anybit::Stats& stats) {
  return nlohmann::json{{"queued", stats.queued},
                        {"running", stats.running},
                        {"slots", stats.slots},
                        {"cache_tokens", stats.cache_tokens},
                        {"cache_capacity", stats.cache_capacity},
                        {"prompt_tokens", stats.prompt_tokens},
                        {"cached_tokens", stats.cached_tokens},
                        {"completion_tokens", stats.completion_tokens},
                        {"stopped", stats.stopped},
                        {"full", stats.full},
                        {"cancelled", stats.cancelled},
                        {"failed", stats.failed},
                        {"steps", stats.steps},
                        {"model_s", stats.model_s},
                        {"engine_s", stats.engine_s},
                        {"lost", stats.lost}}
      .dump();
}

}  // namespace

int anybit_version(void) { return ANYBIT_VERSION; }

void anybit_options_init(anybit_options* options, size_t size) {
  write(options, size, option_defaults());
}

void anybit_request_init(const anybit_engine* engine, anybit_request* request, size_t size) {
  write(request, size,
        request_defaults(engine ? engine->model->card().sampling : anybit::Sampling()));
}

anybit_engine* anybit_open(const char* folder, const anybit_options* options, char** error) {
  return guarded<anybit_engine*>(nullptr, error, [&] {
    check(folder, "folder");
    const anybit_options given = read(options, option_defaults());
    anybit::LoadOptions load;
    if (given.backend) load.backend = given.backend;
    load.slots = given.slots;
    load.threads = given.threads;
    load.capacity = given.capacity;
    load.chunk = given.chunk;
    load.memory_limit = given.memory_limit;
    load.verify = given.verify != 0;
    load.onnxruntime = text(given.onnxruntime);
    load.kernels = text(given.kernels);
    load.tensorrt = text(given.tensorrt);
    load.cuda_graphs = given.cuda_graphs != 0;
    anybit::EngineOptions engine;
    engine.queue = given.queue;
    engine.reuse_prefixes = given.reuse_prefixes != 0;
    auto model = anybit::Model::load(folder, load);
    return new anybit_engine{model, anybit::Engine(model, engine)};
  });
}

void anybit_close(anybit_engine* engine) { delete engine; }

char* anybit_card(const anybit_engine* engine, char** error) {
  return guarded<char*>(nullptr, error, [&] {
    check(engine, "engine");
    return copy(json_of(engine->model->card()));
  });
}

char* anybit_stats(const anybit_engine* engine, char** error) {
  return guarded<char*>(nullptr, error, [&] {
    check(engine, "engine");
    return copy(json_of(engine->engine.stats()));
  });
}

int64_t anybit_encode(const anybit_engine* engine, const char* given, int add_special,
                      int32_t* tokens, size_t room, char** error) {
  return guarded<int64_t>(-1, error, [&] {
    check(engine, "engine");
    const auto found = engine->model->tokenizer().encode(text(given), add_special != 0);
    if (tokens) std::copy_n(found.begin(), std::min(room, found.size()), tokens);
    return static_cast<int64_t>(found.size());
  });
}

char* anybit_decode(const anybit_engine* engine, const int32_t* tokens, size_t count,
                    int skip_special, size_t* length, char** error) {
  return guarded<char*>(nullptr, error, [&] {
    check(engine, "engine");
    const std::string made =
        engine->model->tokenizer().decode(list(tokens, count, "tokens"), skip_special != 0);
    if (length) *length = made.size();
    return copy(made);
  });
}

char* anybit_render_chat(const anybit_engine* engine, const char* const* roles,
                         const char* const* contents, size_t count, int generation_prompt,
                         char** error) {
  return guarded<char*>(nullptr, error, [&] {
    check(engine, "engine");
    check_list(roles, count, "roles");
    check_list(contents, count, "contents");
    std::vector<anybit::Message> messages;
    for (size_t i = 0; i < count; ++i) messages.push_back({text(roles[i]), text(contents[i])});
    return copy(engine->model->chat().render(messages, generation_prompt != 0));
  });
}

anybit_handle* anybit_submit(anybit_engine* engine, const anybit_request* request, char** error) {
  return guarded<anybit_handle*>(nullptr, error, [&] {
    check(engine, "engine");
    check(request, "request");
    const anybit_request given = read(request, request_defaults(engine->model->card().sampling));
    auto made = std::make_unique<anybit_handle>();
    made->handle = engine->engine.submit(request_of(given));
    return made.release();
  });
}

void anybit_cancel(anybit_handle* handle) {
  if (handle) handle->handle.cancel();
}

int anybit_wait(anybit_handle* handle, anybit_finish* finish, char** error) {
  return guarded<int>(-1, error, [&] {
    check(handle, "handle");
    const anybit_finish made = finish_of(handle->handle.wait());
    if (finish) {
      const size_t size = read(finish, made).size;  // checks it
      memcpy(finish, &made, std::min(size, sizeof made));
      finish->size = size;
    }
    return 0;
  });
}

void anybit_release(anybit_handle* handle) { delete handle; }

void anybit_free(char* text) { free(text); }
