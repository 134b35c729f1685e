// Runs requests on one model: they join and leave between two calls of it.
#include "anybit/engine.hpp"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <list>
#include <mutex>
#include <string_view>
#include <thread>
#include <tuple>

#include "parts.hpp"
#include "sampler.hpp"
#include "stops.hpp"

namespace anybit {
namespace {

using Clock = std::chrono::steady_clock;

double seconds(Clock::time_point from, Clock::time_point to) {
  return std::chrono::duration<double>(to - from).count();
}

}  // namespace

const char* name(Reason reason) {
  switch (reason) {
    case Reason::stop: return "stop";
    case Reason::length: return "length";
    case Reason::cancelled: return "cancelled";
    case Reason::error: return "error";
  }
  return "";
}

struct Handle::State {
  uint64_t id = 0;
  std::thread::id engine;  // its thread
  std::atomic<bool> cancelled{false};
  std::mutex mutex;
  std::condition_variable ended;
  bool done = false;
  Finish finish;
};

void Handle::cancel() {
  if (state_) state_->cancelled = true;
}

Finish Handle::wait() const {
  if (!state_) {
    throw Error("Handle::wait", "got a handle of nothing, expected one of submit()",
                "Submit a request first");
  }
  std::unique_lock lock(state_->mutex);
  // Where the engine is gone, another thread may have its number: but then the request has ended.
  if (!state_->done && std::this_thread::get_id() == state_->engine) {
    throw Error("Handle::wait", "got a call on the engine's thread, expected another",
                "Use on_finish in callbacks");
  }
  state_->ended.wait(lock, [&] { return state_->done; });
  return state_->finish;
}

bool Handle::done() const {
  if (!state_) return true;
  const std::lock_guard lock(state_->mutex);
  return state_->done;
}

uint64_t Handle::id() const { return state_ ? state_->id : 0; }

namespace {

// A request from submit() to its end.
struct Job {
  Request request;
  std::shared_ptr<Handle::State> state;
  Sampler sampler;
  Stops stops;
  std::optional<Tokenizer::Stream> text;
  int limit;  // most new tokens
  Clock::time_point submitted = Clock::now(), begun{}, first{};
  int slot = -1;
  bool started = false;  // has its first token
  int32_t newest = 0;    // which is not in the cache yet
  bool ended = false;
  Finish finish{};

  bool ends(int32_t token, const std::vector<int32_t>& model) const {
    const auto in = [token](const std::vector<int32_t>& tokens) {
      return std::find(tokens.begin(), tokens.end(), token) != tokens.end();
    };
    return in(request.stop_tokens) || (!request.ignore_end && in(model));
  }
};

struct Slot {
  std::vector<int32_t> tokens;  // in its cache
  Job* job = nullptr;
  uint64_t freed = 0;  // when, counted in requests that left a slot
};

// Below this, the place of a slot matters more than what it holds.
constexpr int kWorthReusing = 16;

int common(const std::vector<int32_t>& a, const std::vector<int32_t>& b) {
  const auto most = static_cast<ptrdiff_t>(std::min(a.size(), b.size()));
  return static_cast<int>(std::mismatch(a.begin(), a.begin() + most, b.begin()).first - a.begin());
}

void add(Stats& to, const Stats& from) {
  to.prompt_tokens += from.prompt_tokens;
  to.cached_tokens += from.cached_tokens;
  to.completion_tokens += from.completion_tokens;
  to.steps += from.steps;
  to.model_s += from.model_s;
  to.engine_s += from.engine_s;
}

}  // namespace

struct Engine::Impl {
  Impl(std::shared_ptr<Model> opened, EngineOptions chosen);
  ~Impl();

  // On any thread.
  Handle submit(Request request);
  void check(Request& request) const;
  void refuse_own_thread(const char* where) const;
  void drain();
  Stats stats() const;

  // On the engine's thread, without the lock.
  void run();
  bool begin_round();
  void start(std::unique_ptr<Job> job);
  size_t choose_slot(const Job& job) const;
  int reusable(const Slot& slot, const Job& job) const;
  void step();
  void prefill(Job& job);
  void decode();
  bool worth_computing(size_t hole) const;
  void decode(size_t first, size_t last);
  const float* forward(const std::vector<Row>& rows, bool logits);
  void token(Job& job, const float* logits);
  void end(Job& job, Reason reason, std::string_view detail = "") noexcept;
  void count_time(double& spent);

  const std::shared_ptr<Model> model;
  Model::Parts& parts;
  const EngineOptions options;

  // Of the engine's thread.
  std::vector<std::unique_ptr<Job>> jobs;  // that have a slot, the oldest first
  std::vector<Slot> slots;
  std::vector<Row> rows;      // of the call that decodes
  std::vector<Job*> decoded;  // whose rows these are; null of an idle slot
  uint64_t freed = 0;
  Stats round;             // what is not in the totals yet
  Clock::time_point mark;  // until when time is counted

  mutable std::mutex mutex;  // of what follows
  std::condition_variable wake, idle;
  std::list<std::unique_ptr<Job>> queue;  // whose jobs move without memory
  size_t running = 0;                     // left the queue and have not ended
  bool draining = false, stopping = false;
  std::string lost;  // why no request can run any more
  uint64_t ids = 0;
  Stats totals;

  std::thread thread;
};

Engine::Impl::Impl(std::shared_ptr<Model> opened, EngineOptions chosen)
    : model(std::move(opened)),
      parts(model->parts()),
      options(chosen),
      slots(static_cast<size_t>(parts.card.slots)) {
  if (parts.taken.exchange(true)) {
    throw Error("engine", "got a model that has an engine, expected one without",
                "Use that engine, or load the model again");
  }
  jobs.reserve(slots.size());  // so that no job is lost where there is no memory
  totals.slots = slots.size();
  totals.cache_capacity = slots.size() * static_cast<uint64_t>(parts.card.max_context);
  thread = std::thread([this] { run(); });
}

Engine::Impl::~Impl() {
  {
    const std::lock_guard lock(mutex);
    stopping = draining = true;
  }
  wake.notify_all();
  thread.join();
  parts.taken = false;
}

// -- any thread

Handle Engine::Impl::submit(Request request) {
  check(request);
  const size_t prompt = request.tokens.size();
  const int room = parts.card.max_context - static_cast<int>(prompt);
  const int limit = std::min(request.max_new_tokens, room);
  Sampler sampler(request.sampling, parts.card.vocab, request.tokens);
  Stops stops(request.stop);
  std::optional<Tokenizer::Stream> text;
  if (parts.tokenizer.value) text = parts.tokenizer.value->stream();
  auto job =
      std::make_unique<Job>(Job{std::move(request), std::make_shared<Handle::State>(),
                                std::move(sampler), std::move(stops), std::move(text), limit});
  job->finish.prompt_tokens = static_cast<int>(prompt);
  const std::shared_ptr<Handle::State> state = job->state;
  state->engine = thread.get_id();
  {
    const std::lock_guard lock(mutex);
    if (!lost.empty()) throw Lost("engine", lost, "Start a new process");
    if (draining) {
      throw Draining("engine", "got a request while draining, expected none",
                     "Send it to another engine");
    }
    const size_t most = options.queue + slots.size() - std::min(running, slots.size());
    if (queue.size() >= most) {
      throw QueueFull("engine",
                      "got " + std::to_string(queue.size()) +
                          " requests waiting, expected fewer than " + std::to_string(most),
                      "Try again later, or load with more slots");
    }
    state->id = ++ids;
    queue.push_back(std::move(job));
  }
  wake.notify_one();
  return Handle(state);
}

// Encodes the prompt where it is text; throws Error where the request cannot be run.
void Engine::Impl::check(Request& request) const {
  if (request.tokens.empty() && !request.text.empty()) {
    request.tokens = parts.tokenizer.get().encode(request.text);
  }
  const int context = parts.card.max_context, vocab = parts.card.vocab;
  if (request.tokens.empty()) {
    throw Error("prompt", "got no tokens, expected at least one", "Give some text");
  }
  if (request.tokens.size() >= static_cast<size_t>(context)) {
    throw Error("prompt",
                "got " + std::to_string(request.tokens.size()) +
                    " tokens, expected fewer than the context of " + std::to_string(context),
                "Give a shorter prompt, or load or export with a larger context");
  }
  for (const int32_t id : request.tokens) {
    if (id < 0 || id >= vocab) {
      throw Error(
          "prompt",
          "got token " + std::to_string(id) + ", expected 0 to " + std::to_string(vocab - 1),
          "Encode the text with the model's own tokenizer");
    }
  }
  if (request.max_new_tokens < 1) {
    throw Error("max_new_tokens",
                "got " + std::to_string(request.max_new_tokens) + ", expected at least 1",
                "Give such a number");
  }
  if (!request.stop.empty()) parts.tokenizer.get();
  for (const std::string& stop : request.stop) {
    if (stop.empty()) throw Error("stop", "got an empty string, expected text", "Leave it out");
  }
  check_sampling(request.sampling, vocab);
}

void Engine::Impl::refuse_own_thread(const char* where) const {
  if (std::this_thread::get_id() != thread.get_id()) return;
  throw Error(where, "got a call on the engine's thread, expected another",
              "Call it outside of callbacks");
}

void Engine::Impl::drain() {
  refuse_own_thread("Engine::drain");
  std::unique_lock lock(mutex);
  draining = true;
  idle.wait(lock, [this] { return queue.empty() && running == 0; });
}

Stats Engine::Impl::stats() const {
  const std::lock_guard lock(mutex);
  Stats now = totals;
  now.queued = queue.size();
  now.running = running;
  now.lost = lost;
  return now;
}

// -- the engine's thread

void Engine::Impl::run() {
  mark = Clock::now();
  while (begin_round()) {
    try {
      step();
    } catch (const std::exception& error) {  // no memory, in all likelihood
      for (const auto& job : jobs) end(*job, Reason::error, error.what());
    }
  }
}

// Waits for work and gives waiting requests to free slots; false at the end.
bool Engine::Impl::begin_round() {
  jobs.erase(std::remove_if(jobs.begin(), jobs.end(), [](const auto& job) { return job->ended; }),
             jobs.end());
  std::list<std::unique_ptr<Job>> starting, over;
  bool stop;
  {
    std::unique_lock lock(mutex);
    count_time(round.engine_s);
    add(totals, round);
    round = {};
    totals.cache_tokens = 0;
    for (const auto& job : jobs) totals.cache_tokens += slots[job->slot].tokens.size();
    wake.wait(lock, [this] { return stopping || !queue.empty() || !jobs.empty(); });
    mark = Clock::now();
    stop = stopping;
    for (auto next = queue.begin(); next != queue.end();) {
      const auto job = next++;
      if (stop || !lost.empty() || (*job)->state->cancelled) {
        over.splice(over.end(), queue, job);
      } else if (jobs.size() + starting.size() < slots.size()) {
        starting.splice(starting.end(), queue, job);
      }
    }
    running += over.size() + starting.size();
  }
  for (const auto& job : over) {  // `lost` is written by this thread alone
    end(*job, lost.empty() ? Reason::cancelled : Reason::error, lost);
  }
  for (auto& job : starting) start(std::move(job));
  if (stop) {
    for (const auto& job : jobs) end(*job, Reason::cancelled);
  }
  return !stop;
}

void Engine::Impl::start(std::unique_ptr<Job> job) {
  const size_t chosen = choose_slot(*job);
  Slot& slot = slots[chosen];
  slot.tokens.resize(static_cast<size_t>(reusable(slot, *job)));
  slot.job = job.get();
  job->slot = static_cast<int>(chosen);
  job->begun = Clock::now();
  job->finish.cached_tokens = static_cast<int>(slot.tokens.size());
  round.cached_tokens += slot.tokens.size();
  jobs.push_back(std::move(job));
}

// The free slot that holds most of the prompt; of equals one beside those that run, as one call
// computes a range of slots; of these the one that has been free for longest.
size_t Engine::Impl::choose_slot(const Job& job) const {
  int low = static_cast<int>(slots.size()), high = -1;
  for (const auto& other : jobs) {
    low = std::min(low, other->slot);
    high = std::max(high, other->slot);
  }
  size_t chosen = slots.size();
  std::tuple<int, int, uint64_t> least;
  for (size_t i = 0; i < slots.size(); ++i) {
    if (slots[i].job) continue;
    const int place = static_cast<int>(i), saved = reusable(slots[i], job);
    const int apart = high < 0 ? 0 : std::max({low - place, place - high, 0});
    const std::tuple cost(saved < kWorthReusing ? 0 : -saved, apart, slots[i].freed);
    if (chosen == slots.size() || cost < least) {
      chosen = i;
      least = cost;
    }
  }
  return chosen;
}

// Tokens of the slot's cache that the prompt begins with; its last token is always computed.
int Engine::Impl::reusable(const Slot& slot, const Job& job) const {
  if (!options.reuse_prefixes) return 0;
  return std::min(common(slot.tokens, job.request.tokens), job.finish.prompt_tokens - 1);
}

// One chunk of the oldest prompt that is not computed yet, and one token for each that is.
void Engine::Impl::step() {
  for (const auto& job : jobs) {
    if (job->state->cancelled) end(*job, Reason::cancelled);
  }
  const auto waiting = std::find_if(jobs.begin(), jobs.end(),
                                    [](const auto& job) { return !job->ended && !job->started; });
  if (waiting != jobs.end()) prefill(**waiting);
  decode();
}

void Engine::Impl::prefill(Job& job) {
  const std::vector<int32_t>& prompt = job.request.tokens;
  std::vector<int32_t>& cached = slots[job.slot].tokens;
  const size_t filled = cached.size();
  const size_t count = std::min(prompt.size() - filled, static_cast<size_t>(parts.chunk));
  const bool whole = filled + count == prompt.size();
  const int32_t* tokens = prompt.data() + filled;
  const Row row{job.slot, tokens, static_cast<int>(count), static_cast<int>(filled)};
  const float* logits = forward({row}, whole);
  if (job.ended) return;  // the call failed
  cached.insert(cached.end(), tokens, tokens + count);
  round.prompt_tokens += count;
  if (whole) token(job, logits);
}

void Engine::Impl::decode() {
  const auto decodes = [this](size_t i) {
    return slots[i].job && slots[i].job->started && !slots[i].job->ended;
  };
  const auto most = static_cast<size_t>(parts.backend->most_rows());
  for (size_t first = 0; first < slots.size(); ++first) {
    if (!decodes(first)) continue;
    size_t last = first, hole = 0;  // tokens in slots behind `last`
    for (size_t i = first; i < std::min(first + most, slots.size()); ++i) {
      if (!decodes(i)) {
        hole += slots[i].tokens.size();
      } else if (worth_computing(hole)) {
        last = i;
        hole = 0;
      } else {
        break;
      }
    }
    decode(first, last);
    first = last;
  }
}

// Whether to compute idle slots along with those around them: their caches are read then, and with a
// call more the weights.
bool Engine::Impl::worth_computing(size_t hole) const {
  return hole * parts.token_bytes <= parts.card.memory.weights;
}

// A token for each request in a range of slots. A slot without one is computed with the others: what
// is written behind its tokens is never seen.
void Engine::Impl::decode(size_t first, size_t last) {
  static constexpr int32_t kNothing = 0;
  rows.clear();
  decoded.clear();
  for (size_t i = first; i <= last; ++i) {
    Job* job = slots[i].job && slots[i].job->started ? slots[i].job : nullptr;
    std::vector<int32_t>& cached = slots[i].tokens;
    if (!job && cached.size() == static_cast<size_t>(parts.card.max_context)) cached.pop_back();
    rows.push_back(
        {static_cast<int>(i), job ? &job->newest : &kNothing, 1, static_cast<int>(cached.size())});
    decoded.push_back(job);
  }
  const float* logits = forward(rows, true);
  if (!logits) return;
  for (Job* job : decoded) {
    if (job) {
      slots[job->slot].tokens.push_back(job->newest);
      token(*job, logits);
    }
    logits += parts.card.vocab;
  }
}

// One call of the model. Where it fails, the requests that have a token of theirs in it end; the
// prompt of another in its range is computed again.
const float* Engine::Impl::forward(const std::vector<Row>& rows, bool logits) {
  count_time(round.engine_s);
  const float* result = nullptr;
  std::string why;
  try {
    result = parts.backend->forward(rows, logits);
  } catch (const std::exception& error) {
    why = error.what();
  }
  count_time(round.model_s);
  ++round.steps;
  if (why.empty()) return result;

  const std::string gone = parts.backend->lost();
  if (!gone.empty()) {  // first, so that whoever hears of the end is not let in again
    const std::lock_guard lock(mutex);
    lost = gone;
  }
  for (const Row& row : rows) {
    Slot& slot = slots[row.slot];
    slot.tokens.clear();
    if (slot.job && (slot.job->started || rows.size() == 1)) end(*slot.job, Reason::error, why);
  }
  if (!gone.empty()) {
    for (const auto& job : jobs) end(*job, Reason::error, gone);
  }
  return nullptr;
}

// Takes a request's next token from its logits, [vocab].
void Engine::Impl::token(Job& job, const float* logits) {
  if (job.state->cancelled) return end(job, Reason::cancelled);
  try {
    Choice choice = job.sampler.choose(logits);
    if (!job.started) job.first = Clock::now();
    job.started = true;
    job.newest = choice.id;
    if (job.ends(choice.id, parts.card.end_tokens)) return end(job, Reason::stop);
    ++job.finish.completion_tokens;
    ++round.completion_tokens;
    const std::string text = job.stops.push(job.text ? job.text->push(choice.id) : "");
    if (job.request.on_token) {
      job.request.on_token({choice.id, text, choice.logprob, std::move(choice.top)});
    }
  } catch (const std::exception& error) {
    return end(job, Reason::error, error.what());
  }
  if (!job.stops.found().empty()) return end(job, Reason::stop, job.stops.found());
  if (job.finish.completion_tokens == job.limit) end(job, Reason::length);
}

// Whatever fails on the way, the request ends.
void Engine::Impl::end(Job& job, Reason reason, std::string_view detail) noexcept {
  if (job.ended) return;
  job.ended = true;
  if (job.slot >= 0) {
    slots[job.slot].job = nullptr;
    slots[job.slot].freed = ++freed;
  }

  const auto now = Clock::now();
  Finish& finish = job.finish;
  finish.reason = reason;
  finish.queued_s = seconds(job.submitted, job.slot < 0 ? now : job.begun);
  if (job.slot >= 0) finish.prefill_s = seconds(job.begun, job.started ? job.first : now);
  if (job.started) finish.decode_s = seconds(job.first, now);
  try {
    finish.detail = detail;
    finish.text = job.stops.push(job.text ? job.text->finish() : "") + job.stops.finish();
  } catch (const std::exception&) {  // no memory
    finish.reason = Reason::error;
  }
  {
    const std::lock_guard lock(mutex);
    add(totals, round);
    round = {};
    ++(finish.reason == Reason::stop        ? totals.stopped
       : finish.reason == Reason::length    ? totals.full
       : finish.reason == Reason::cancelled ? totals.cancelled
                                            : totals.failed);
  }
  try {
    if (job.request.on_finish) job.request.on_finish(finish);
  } catch (...) {  // there is nobody to tell
  }
  {
    const std::lock_guard lock(mutex);
    --running;
    const std::lock_guard state(job.state->mutex);
    job.state->finish = std::move(finish);
    job.state->done = true;
  }
  job.state->ended.notify_all();
  idle.notify_all();
}

void Engine::Impl::count_time(double& spent) {
  const auto now = Clock::now();
  spent += seconds(mark, now);
  mark = now;
}

// -- the interface

Engine::Engine(std::shared_ptr<Model> model, EngineOptions options)
    : impl_(std::make_unique<Impl>(std::move(model), options)) {}

Engine::~Engine() = default;

Handle Engine::submit(Request request) { return impl_->submit(std::move(request)); }

Stats Engine::stats() const { return impl_->stats(); }

void Engine::drain() { impl_->drain(); }

const std::shared_ptr<Model>& Engine::model() const { return impl_->model; }

}  // namespace anybit
