// A libanybit.so without a model, for tests of what stands around the engine: each token is a letter
// that the prompt and the seed determine, and OUT/fake.json says how long a step takes.
//
// Words in a prompt make it behave in other ways:
//   END=n   the model's end after n tokens
//   FAIL=n  the step after n tokens fails
//   LOSE=n  so it does, and no later one can succeed
//   WIDE    tokens are bytes of three-byte characters, whose text comes with the last byte
#include <algorithm>
#include <anybit/anybit.hpp>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <fstream>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <thread>

#include "unicode.hpp"

namespace anybit {
namespace {

constexpr int kEnd = 256, kVocab = 257;

uint64_t hash(const std::vector<int32_t>& tokens, uint64_t seed) {
  uint64_t h = 0xcbf29ce484222325u ^ seed;
  for (const int32_t token : tokens) h = (h ^ static_cast<uint64_t>(token)) * 0x100000001b3u;
  return h;
}

int letter(uint64_t h, int n) {
  uint64_t x = h + static_cast<uint64_t>(n) * 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return 'a' + static_cast<int>((x >> 33) % 26);
}

// The number behind a word of the prompt; -1: the word is not there.
int number(const std::string& prompt, const char* word) {
  const size_t place = prompt.find(word);
  return place == std::string::npos ? -1 : std::atoi(prompt.c_str() + place + std::strlen(word));
}

}  // namespace

// ---------------------------------------------------------------- tokenizer and template

struct Tokenizer::Data {};

Tokenizer Tokenizer::parse(std::string_view, const std::string&) {
  return Tokenizer(std::make_shared<Data>());
}

std::vector<int32_t> Tokenizer::encode(std::string_view text, bool) const {
  return encode(text, std::vector<std::pair<size_t, size_t>>{});
}

std::vector<int32_t> Tokenizer::encode(std::string_view text,
                                       const std::vector<std::pair<size_t, size_t>>& plain) const {
  std::vector<int32_t> tokens;
  for (size_t i = 0; i < text.size(); ++i) {
    const auto holds = [i](const auto& one) { return one.first <= i && i < one.second; };
    if (text.substr(i, 5) == "<end>" && std::none_of(plain.begin(), plain.end(), holds)) {
      tokens.push_back(kEnd);
      i += 4;
    } else {
      tokens.push_back(static_cast<unsigned char>(text[i]));
    }
  }
  return tokens;
}

std::string Tokenizer::bytes(int32_t id) const {
  return id == kEnd ? "<end>" : std::string(1, static_cast<char>(id));
}

std::string Tokenizer::decode(const std::vector<int32_t>& tokens, bool skip_special) const {
  std::string text;
  for (const int32_t token : tokens) {
    if (token != kEnd) text += static_cast<char>(token);
    if (token == kEnd && !skip_special) text += "<end>";
  }
  return unicode::valid(text);
}

std::optional<std::string> Tokenizer::token(int32_t id) const { return decode({id}, false); }

struct ChatTemplate::Data {
  std::string why_not;
};

ChatTemplate ChatTemplate::parse(std::string_view why_not, const std::string&) {
  return ChatTemplate(std::make_shared<Data>(Data{std::string(why_not)}));
}

Prompt ChatTemplate::prompt(const std::vector<Message>& messages, bool generation) const {
  if (!data_->why_not.empty()) throw Error("chat template", data_->why_not, "Use /v1/completions");
  Prompt prompt;
  for (const Message& message : messages) {
    if (message.role != "system" && message.role != "user" && message.role != "assistant") {
      throw Error("messages",
                  "got the role " + message.role + ", expected system, user or assistant",
                  "Give one of these");
    }
    prompt.text += "[" + message.role + "]";
    const size_t begin = prompt.text.size();
    prompt.text += message.content;
    if (!message.content.empty()) prompt.contents.emplace_back(begin, prompt.text.size());
  }
  if (generation) prompt.text += "[assistant]";
  return prompt;
}

// ---------------------------------------------------------------- model

struct Model::Parts {
  Card card;
  Tokenizer tokenizer;
  ChatTemplate chat;
  std::chrono::microseconds step;
};

Model::Model(std::unique_ptr<Parts> parts) : parts_(std::move(parts)) {}
Model::~Model() = default;
const Card& Model::card() const { return parts_->card; }
const Tokenizer& Model::tokenizer() const { return parts_->tokenizer; }
const ChatTemplate& Model::chat() const { return parts_->chat; }

std::string MemoryPlan::text() const { return std::to_string(total()) + " bytes"; }

std::shared_ptr<Model> Model::load(const std::filesystem::path& folder,
                                   const LoadOptions& options) {
  std::ifstream file(folder / "fake.json");
  if (!file) {
    throw Error((folder / "fake.json").string(), "got no such file, expected it", "Write one");
  }
  const nlohmann::json fake = nlohmann::json::parse(file);
  std::this_thread::sleep_for(std::chrono::milliseconds(fake.value("load_ms", 0)));
  Card card;
  card.name = "fake";
  card.family = "llama";
  card.scheme = "w4a8";
  card.method = "rtn";
  card.dtype = "float16";
  card.vocab = kVocab;
  card.layers = 2;
  card.hidden = 64;
  card.context = card.max_context = fake.value("context", 4096);
  card.end_tokens = {kEnd};
  card.backend = "none " + options.backend + (options.cuda_graphs ? "" : ", no CUDA graphs");
  card.cache_form = "static";
  card.slots = options.slots;
  card.threads = 1;
  card.proof = "passed";
  card.memory.weights = 123'456'789;
  card.memory.cache = 1 << 20;
  auto parts = std::make_unique<Parts>(
      Parts{card, Tokenizer::parse("", ""), ChatTemplate::parse(fake.value("why_not", ""), ""),
            std::chrono::microseconds(fake.value("step_us", 200))});
  return std::make_shared<Model>(std::move(parts));
}

// ---------------------------------------------------------------- engine

struct Handle::State {
  Request request;
  uint64_t id;
  std::atomic<bool> cancelled{false};
  uint64_t h;
  int end, fail, lose;
  bool wide;
  int made = 0;
  std::string shown, held;
  std::chrono::steady_clock::time_point submitted, started;
};

void Handle::cancel() { state_->cancelled = true; }
uint64_t Handle::id() const { return state_ ? state_->id : 0; }

struct Engine::Impl {
  std::shared_ptr<Model> model;
  EngineOptions options;
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<std::shared_ptr<Handle::State>> queue;
  std::vector<std::shared_ptr<Handle::State>> running;
  Stats stats;
  bool stopping = false;
  uint64_t ids = 0;
  std::thread thread;

  // On the engine's thread; `lock` is not held while callbacks run.
  void finish(const std::shared_ptr<Handle::State>& state, Reason reason, std::string detail) {
    Finish finish;
    finish.reason = reason;
    finish.detail = std::move(detail);
    finish.prompt_tokens = static_cast<int>(state->request.tokens.size());
    finish.completion_tokens = state->made;
    finish.queued_s = std::chrono::duration<double>(state->started - state->submitted).count();
    {
      const std::lock_guard<std::mutex> lock(mutex);
      uint64_t* counts[] = {&stats.stopped, &stats.full, &stats.cancelled, &stats.failed};
      ++*counts[static_cast<int>(reason)];
    }
    state->request.on_finish(finish);
    state->request.on_token = nullptr;
    state->request.on_finish = nullptr;
  }

  // One token; whether the request goes on.
  bool step(const std::shared_ptr<Handle::State>& s) {
    const Request& request = s->request;
    if (s->cancelled) return finish(s, Reason::cancelled, ""), false;
    if (s->made == s->lose) {
      {
        const std::lock_guard<std::mutex> lock(mutex);
        stats.lost = "got a lost device, as a prompt asked";
      }
      return finish(s, Reason::error, "step: the device is lost, as the prompt asked"), false;
    }
    if (s->made == s->fail)
      return finish(s, Reason::error, "step: it failed, as the prompt asked"), false;
    if (s->made == s->end && !request.ignore_end) return finish(s, Reason::stop, ""), false;
    Token token;
    token.id = letter(s->h, s->made);
    std::string text(1, static_cast<char>(token.id));
    if (s->wide) {  // U+4E00 and on
      const int c = 0x4e00 + letter(s->h, s->made / 3);
      const unsigned char bytes[] = {static_cast<unsigned char>(0xe0 | c >> 12),
                                     static_cast<unsigned char>(0x80 | (c >> 6 & 63)),
                                     static_cast<unsigned char>(0x80 | (c & 63))};
      token.id = bytes[s->made % 3];
      s->held += static_cast<char>(token.id);
      text = s->made % 3 == 2 ? std::exchange(s->held, "") : "";
    }
    for (const auto& [id, bias] : request.sampling.logit_bias) {
      if (bias >= 100) token.id = id, text = std::string(1, static_cast<char>(id));
    }
    ++s->made;
    {
      const std::lock_guard<std::mutex> lock(mutex);
      ++stats.completion_tokens;
    }
    if (request.sampling.logprobs >= 0) {
      token.logprob = -0.5f;
      for (int i = 0; i < request.sampling.logprobs; ++i) {
        token.top.emplace_back((token.id + i) % 256, -0.5f - static_cast<float>(i));
      }
    }
    for (const std::string& stop : request.stop) {
      const std::string all = s->shown + text;
      if (all.size() >= stop.size() &&
          all.compare(all.size() - stop.size(), stop.size(), stop) == 0) {
        return finish(s, Reason::stop, stop), false;
      }
    }
    s->shown += text;
    token.text = text;
    request.on_token(token);
    const bool full =
        static_cast<int>(request.tokens.size()) + s->made >= model->card().max_context;
    if (s->made == request.max_new_tokens || full) return finish(s, Reason::length, ""), false;
    return true;
  }

  void run() {
    std::unique_lock<std::mutex> lock(mutex);
    while (true) {
      changed.wait(lock, [this] { return stopping || !queue.empty() || !running.empty(); });
      if (stopping) break;
      while (!queue.empty() && running.size() < stats.slots) {
        running.push_back(std::move(queue.front()));
        queue.pop_front();
        running.back()->started = std::chrono::steady_clock::now();
      }
      std::vector<std::shared_ptr<Handle::State>> now = running, left, dead;
      for (auto& waiting : queue) (waiting->cancelled ? dead : left).push_back(waiting);
      queue.assign(left.begin(), left.end());
      left.clear();
      lock.unlock();
      std::this_thread::sleep_for(model->parts().step);
      for (const auto& state : dead) {
        state->started = state->submitted;
        finish(state, Reason::cancelled, "");
      }
      for (const auto& state : now) {
        if (step(state)) left.push_back(state);
      }
      lock.lock();
      ++stats.steps;
      running.swap(left);
    }
    for (auto* list : {&running}) queue.insert(queue.end(), list->begin(), list->end());
    running.clear();
    auto rest = std::move(queue);
    queue.clear();
    lock.unlock();
    for (const auto& state : rest) {
      state->started = state->submitted;
      finish(state, Reason::cancelled, "");
    }
  }
};

Engine::Engine(std::shared_ptr<Model> model, EngineOptions options)
    : impl_(std::make_unique<Impl>()) {
  impl_->stats.slots = static_cast<size_t>(model->card().slots);
  impl_->stats.cache_capacity = impl_->stats.slots * static_cast<size_t>(model->card().max_context);
  impl_->model = std::move(model);
  impl_->options = options;
  impl_->thread = std::thread([impl = impl_.get()] { impl->run(); });
}

Engine::~Engine() {
  {
    const std::lock_guard<std::mutex> lock(impl_->mutex);
    impl_->stopping = true;
  }
  impl_->changed.notify_one();
  impl_->thread.join();
}

Handle Engine::submit(Request request) {
  if (request.tokens.empty()) {
    throw Error("prompt", "got no tokens, expected at least one", "Give a text");
  }
  const auto state = std::make_shared<Handle::State>();
  std::string prompt;
  for (const int32_t token : request.tokens) prompt += static_cast<char>(token);
  state->h = hash(request.tokens, request.sampling.temperature > 0 ? request.sampling.seed : 0);
  state->end = number(prompt, "END=");
  state->fail = number(prompt, "FAIL=");
  state->lose = number(prompt, "LOSE=");
  state->wide = prompt.find("WIDE") != std::string::npos;
  state->request = std::move(request);
  state->submitted = std::chrono::steady_clock::now();
  const std::lock_guard<std::mutex> lock(impl_->mutex);
  const size_t slots = impl_->stats.slots, running = std::min(impl_->running.size(), slots);
  if (impl_->queue.size() >= impl_->options.queue + slots - running) {
    throw QueueFull("queue",
                    "got " + std::to_string(impl_->queue.size()) + " that wait, expected fewer",
                    "Try again later");
  }
  state->id = ++impl_->ids;
  impl_->stats.prompt_tokens += state->request.tokens.size();
  impl_->queue.push_back(state);
  impl_->changed.notify_one();
  return Handle(state);
}

Stats Engine::stats() const {
  const std::lock_guard<std::mutex> lock(impl_->mutex);
  Stats stats = impl_->stats;
  stats.queued = impl_->queue.size();
  stats.running = impl_->running.size();
  for (const auto& state : impl_->running) {
    stats.cache_tokens += state->request.tokens.size();
  }
  return stats;
}

}  // namespace anybit
