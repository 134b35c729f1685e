// The engine on a backend of the test's own, whose best token follows from all that it was fed: who
// joins and leaves, what each call holds, and what a failed call does.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <limits>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "anybit/anybit.hpp"
#include "parts.hpp"
#include "sampler.hpp"
#include "stops.hpp"

using namespace anybit;

namespace {

constexpr int kVocab = 97, kContext = 64;
using Tokens = std::vector<int32_t>;

// The token that follows a text; never 0, which stands for the padding of slots without a request.
int32_t following(const Tokens& text) {
  uint64_t hash = 1469598103934665603;
  for (const int32_t token : text) hash = (hash ^ static_cast<uint64_t>(token)) * 1099511628211;
  return static_cast<int32_t>(hash % (kVocab - 1)) + 1;
}

Tokens continuation(Tokens text, size_t count) {
  const size_t prompt = text.size();
  while (text.size() < prompt + count) text.push_back(following(text));
  return {text.begin() + static_cast<ptrdiff_t>(prompt), text.end()};
}

// Shared by a backend and its test, which runs on another thread.
struct Watch {
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<std::vector<Row>> calls;  // their tokens must not be looked at
  std::set<size_t> failing;             // numbers of calls, the first is 0
  std::string lost;
  bool held = false;   // calls wait
  size_t passing = 0;  // but for the first of them

  void hold(bool value) {
    const std::lock_guard lock(mutex);
    held = value;
    changed.notify_all();
  }
  void pass(size_t count) {
    const std::lock_guard lock(mutex);
    passing = count;
    changed.notify_all();
  }
  void wait_for_calls(size_t count) {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return calls.size() >= count; });
  }
};

// Keeps each slot's text as its cache.
class FakeBackend : public Backend {
 public:
  FakeBackend(Watch& watch, int slots, int most)
      : watch_(watch), most_(most), caches_(static_cast<size_t>(slots)) {}

  int most_rows() const override { return most_; }

  const float* forward(const std::vector<Row>& rows, bool logits) override {
    std::unique_lock lock(watch_.mutex);
    watch_.calls.push_back(rows);
    watch_.changed.notify_all();
    const size_t number = watch_.calls.size();
    watch_.changed.wait(lock, [&] { return !watch_.held || number <= watch_.passing; });
    REQUIRE(rows.size() <= static_cast<size_t>(most_));
    logits_.assign(rows.size() * kVocab, 0.0f);
    for (size_t i = 0; i < rows.size(); ++i) {
      const Row& row = rows[i];
      REQUIRE(row.slot == rows[0].slot + static_cast<int>(i));
      REQUIRE(row.count == rows[0].count);
      REQUIRE(row.filled + row.count <= kContext);
      Tokens& cache = caches_[static_cast<size_t>(row.slot)];
      REQUIRE(static_cast<size_t>(row.filled) <= cache.size());
      cache.resize(static_cast<size_t>(row.filled));
      cache.insert(cache.end(), row.tokens, row.tokens + row.count);
      logits_[i * kVocab + static_cast<size_t>(following(cache))] = 1;
    }
    if (watch_.failing.count(watch_.calls.size() - 1) > 0) {
      for (const Row& row : rows) caches_[static_cast<size_t>(row.slot)].assign(kContext, 96);
      throw Error("a call", "got a fault, expected none", "Try again");
    }
    return logits ? logits_.data() : nullptr;
  }

  std::string lost() const override { return watch_.lost; }

 private:
  Watch& watch_;
  const int most_;
  std::vector<Tokens> caches_;
  std::vector<float> logits_;
};

// Spells token 1 as "a", 2 as "b" ... 26 as "z", and each of the others as one of these.
std::string tokenizer_json() {
  std::string vocab;
  for (int i = 0; i < kVocab; ++i) {
    const std::string text(static_cast<size_t>(i / 26 + 1), static_cast<char>('a' + (i + 25) % 26));
    vocab += (i ? ",\"" : "\"") + text + "\":" + std::to_string(i);
  }
  return R"({"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,)"
         R"("pre_tokenizer":{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,)"
         R"("use_regex":true},"post_processor":null,"decoder":{"type":"ByteLevel",)"
         R"("add_prefix_space":true,"trim_offsets":true,"use_regex":true},"model":{"type":"BPE",)"
         R"("dropout":null,"unk_token":null,"continuing_subword_prefix":null,)"
         R"("end_of_word_suffix":null,"fuse_unk":false,"byte_fallback":false,"ignore_merges":false,)"
         R"("vocab":{)" +
         vocab + R"(},"merges":[]}})";
}

struct Setting {
  int slots = 4, most = 4, chunk = 8;
  size_t weights = 1000;  // bytes; the cache of a token is one
  EngineOptions engine;
  Tokens end_tokens;
};

// A model of the fake backend and an engine on it.
struct Bench {
  explicit Bench(const Setting& setting = {}) {
    auto parts = std::make_unique<Model::Parts>();
    parts->card.vocab = kVocab;
    parts->card.max_context = kContext;
    parts->card.slots = setting.slots;
    parts->card.end_tokens = setting.end_tokens;
    parts->card.memory.weights = setting.weights;
    parts->token_bytes = 1;
    parts->chunk = setting.chunk;
    parts->tokenizer.value = Tokenizer::parse(tokenizer_json());
    parts->backend = std::make_unique<FakeBackend>(watch, setting.slots, setting.most);
    model = std::make_shared<Model>(std::move(parts));
    engine.emplace(model, setting.engine);
  }
  ~Bench() { watch.hold(false); }

  Watch watch;
  std::shared_ptr<Model> model;
  std::optional<Engine> engine;
};

struct Answer {
  Tokens tokens;
  std::string text;
  std::vector<Token> all;
  Finish finish;
};

// A request that writes what it is told into `answer`, which must outlive it.
Request asking(Tokens prompt, int count, Answer& answer) {
  Request request;
  request.tokens = std::move(prompt);
  request.max_new_tokens = count;
  request.on_token = [&answer](const Token& token) {
    answer.tokens.push_back(token.id);
    answer.text += token.text;
    answer.all.push_back(token);
  };
  request.on_finish = [&answer](const Finish& finish) {
    answer.finish = finish;
    answer.text += finish.text;
  };
  return request;
}

std::string message(const std::function<void()>& work) {
  try {
    work();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

Tokens prompt_of(size_t seed, size_t length) {
  Tokens prompt;
  for (size_t i = 0; i < length; ++i) {
    prompt.push_back(static_cast<int32_t>(1 + (seed * 31 + i * 7) % (kVocab - 1)));
  }
  return prompt;
}

}  // namespace

TEST_CASE("40 requests of all lengths in 4 slots get their own tokens") {
  for (const int most : {1, 3, 4}) {
    for (const bool reuse : {true, false}) {
      Setting setting;
      setting.most = most;
      setting.engine.reuse_prefixes = reuse;
      Bench bench(setting);
      std::vector<Answer> answers(40);
      std::vector<Handle> handles;
      for (size_t i = 0; i < answers.size(); ++i) {
        const Tokens prompt = prompt_of(i, 1 + i * 17 % 40);
        handles.push_back(
            bench.engine->submit(asking(prompt, 1 + static_cast<int>(i * 5 % 20), answers[i])));
      }
      for (size_t i = 0; i < answers.size(); ++i) {
        const Finish finish = handles[i].wait();
        CHECK(finish.reason == Reason::length);
        CHECK(answers[i].tokens == continuation(prompt_of(i, 1 + i * 17 % 40), 1 + i * 5 % 20));
        CHECK(finish.prompt_tokens == static_cast<int>(1 + i * 17 % 40));
        CHECK(finish.completion_tokens == static_cast<int>(1 + i * 5 % 20));
      }
      const Stats stats = bench.engine->stats();
      CHECK(stats.full == answers.size());
      CHECK(stats.running + stats.queued == 0);
    }
  }
}

TEST_CASE("a long prompt is computed in chunks, and others get tokens in between") {
  Bench bench;
  Answer shorter, longer;
  bench.watch.hold(true);
  const Handle first = bench.engine->submit(asking({5}, 6, shorter));
  bench.watch.wait_for_calls(1);
  const Handle second = bench.engine->submit(asking(prompt_of(1, 20), 2, longer));
  bench.watch.hold(false);
  first.wait();
  second.wait();
  std::vector<std::vector<int>> counts;
  for (const auto& call : bench.watch.calls) {
    counts.emplace_back();
    for (const Row& row : call) counts.back().push_back(row.count);
  }
  // The first request's prompt and token, then a chunk and a token in turn, then both together; the
  // second slot is computed along only where it is between others.
  CHECK(counts == std::vector<std::vector<int>>{{1}, {1}, {8}, {1}, {8}, {1}, {4}, {1, 1}, {1}});
}

TEST_CASE("generation ends with the context") {
  Bench bench;
  Answer answer;
  const Finish finish = bench.engine->submit(asking(prompt_of(3, 60), 99, answer)).wait();
  CHECK(finish.reason == Reason::length);
  CHECK(answer.tokens == continuation(prompt_of(3, 60), 4));
}

TEST_CASE("end tokens, stop tokens and ignore_end") {
  const Tokens text = continuation({7}, 6);
  Setting setting;
  setting.end_tokens = {text[3]};
  Bench bench(setting);
  Answer ended, stopped, ignored;
  Request stop = asking({7}, 6, stopped), ignore = asking({7}, 6, ignored);
  stop.stop_tokens = {text[2]};
  ignore.ignore_end = true;
  CHECK(bench.engine->submit(asking({7}, 6, ended)).wait().reason == Reason::stop);
  CHECK(bench.engine->submit(stop).wait().reason == Reason::stop);
  CHECK(bench.engine->submit(ignore).wait().reason == Reason::length);
  CHECK(ended.tokens == Tokens(text.begin(), text.begin() + 3));
  CHECK(stopped.tokens == Tokens(text.begin(), text.begin() + 2));
  CHECK(ignored.tokens == text);
  CHECK(ended.finish.completion_tokens == 3);
}

TEST_CASE("stop strings end the text in front of them, also across tokens") {
  Bench bench;
  Answer whole;
  bench.engine->submit(asking({9}, 12, whole)).wait();
  REQUIRE(whole.text.size() > 8);
  for (size_t at = 0; at < whole.text.size(); ++at) {
    for (const size_t length : {size_t{1}, size_t{4}}) {
      const std::string stop = whole.text.substr(at, length);
      Answer answer;
      Request request = asking({9}, 12, answer);
      request.stop = {"never", stop};
      const Finish finish = bench.engine->submit(request).wait();
      CHECK(finish.reason == Reason::stop);
      CHECK(finish.detail == stop);
      CHECK(answer.text == whole.text.substr(0, whole.text.find(stop)));
    }
  }
  Answer held;  // what only looks like the beginning of one is given at the end
  Request request = asking({9}, 12, held);
  request.stop = {whole.text.substr(whole.text.size() - 1) + "?"};
  CHECK(bench.engine->submit(request).wait().text == whole.text.substr(whole.text.size() - 1));
  CHECK(held.text == whole.text);
}

TEST_CASE("cancel from any thread frees the slot and keeps the others going") {
  Setting setting;
  setting.slots = 2;
  Bench bench(setting);
  std::vector<Answer> answers(12);
  std::vector<Handle> handles(answers.size());
  bench.watch.hold(true);
  for (size_t i = 0; i < answers.size(); ++i) {
    handles[i] = bench.engine->submit(asking(prompt_of(i, 5), 30, answers[i]));
  }
  std::thread other([&] {
    for (size_t i = 0; i < answers.size(); i += 2) handles[i].cancel();
  });
  other.join();
  bench.watch.hold(false);
  for (size_t i = 0; i < answers.size(); ++i) {
    const Finish finish = handles[i].wait();
    CHECK(finish.reason == (i % 2 ? Reason::length : Reason::cancelled));
    const Tokens whole = continuation(prompt_of(i, 5), 30);
    CHECK(answers[i].tokens == Tokens(whole.begin(), whole.begin() + finish.completion_tokens));
  }
  CHECK(bench.engine->stats().cancelled == 6);
}

TEST_CASE("a waiting request can be cancelled while all slots are taken") {
  Setting setting;
  setting.slots = 1;
  Bench bench(setting);
  Answer running, waiting;
  const Handle first = bench.engine->submit(asking({1}, 60, running));
  bench.watch.wait_for_calls(2);
  Handle second = bench.engine->submit(asking({2}, 5, waiting));
  second.cancel();
  const Finish finish = second.wait();
  CHECK(finish.reason == Reason::cancelled);
  CHECK(waiting.tokens.empty());
  CHECK(first.wait().reason == Reason::length);
}

TEST_CASE("a request cancels itself between two tokens") {
  Bench bench;
  Answer answer;
  Handle handle;
  bench.watch.hold(true);
  Request request = asking({4}, 30, answer);
  request.on_token = [&](const Token& token) {
    answer.tokens.push_back(token.id);
    if (answer.tokens.size() == 3) handle.cancel();
  };
  handle = bench.engine->submit(request);
  bench.watch.hold(false);
  CHECK(handle.wait().reason == Reason::cancelled);
  CHECK(answer.tokens == continuation({4}, 3));
}

TEST_CASE(
    "whichever call fails, its requests end with the reason and the others have their tokens") {
  for (size_t failing = 0; failing < 24; ++failing) {
    Bench bench;
    bench.watch.failing = {failing};
    std::vector<Answer> answers(9);
    std::vector<Handle> handles;
    for (size_t i = 0; i < answers.size(); ++i) {
      handles.push_back(bench.engine->submit(asking(prompt_of(i, 3 + 4 * i % 21), 8, answers[i])));
    }
    size_t failed = 0;
    for (size_t i = 0; i < answers.size(); ++i) {
      const Finish finish = handles[i].wait();
      const Tokens whole = continuation(prompt_of(i, 3 + 4 * i % 21), 8);
      CHECK(answers[i].tokens == Tokens(whole.begin(), whole.begin() + finish.completion_tokens));
      if (finish.reason == Reason::error) {
        ++failed;
        CHECK(finish.detail == "a call: got a fault, expected none. Try again.");
      } else {
        CHECK(finish.reason == Reason::length);
        CHECK(finish.completion_tokens == 8);
      }
    }
    CHECK(failed > 0);
    CHECK(bench.engine->stats().failed == failed);
    Answer after;
    CHECK(bench.engine->submit(asking({3}, 8, after)).wait().reason == Reason::length);
    CHECK(after.tokens == continuation({3}, 8));
  }
}

TEST_CASE("a lost backend ends everything and takes nothing more") {
  Bench bench;
  bench.watch.failing = {3};
  bench.watch.lost = "the device is gone";
  std::vector<Answer> answers(8);
  std::vector<Handle> handles;
  bench.watch.hold(true);
  for (size_t i = 0; i < answers.size(); ++i) {
    handles.push_back(bench.engine->submit(asking({static_cast<int32_t>(i + 1)}, 50, answers[i])));
  }
  bench.watch.hold(false);
  for (const Handle& handle : handles) CHECK(handle.wait().reason == Reason::error);
  CHECK(handles.back().wait().detail == "the device is gone");
  Answer late;
  CHECK(message([&] { bench.engine->submit(asking({1}, 1, late)); }) ==
        "engine: the device is gone. Start a new process.");
}

TEST_CASE("an exception out of a callback ends its request only") {
  Bench bench;
  Answer good;
  Request bad;
  bad.tokens = {8};
  bad.on_token = [](const Token&) { throw std::runtime_error("no place to write to"); };
  bad.on_finish = [](const Finish&) { throw std::runtime_error("nor here"); };
  const Handle first = bench.engine->submit(bad);
  const Handle second = bench.engine->submit(asking({9}, 20, good));
  CHECK(first.wait().reason == Reason::error);
  CHECK(first.wait().detail == "no place to write to");
  CHECK(second.wait().reason == Reason::length);
  CHECK(good.tokens == continuation({9}, 20));
}

TEST_CASE("a prompt that begins like a cached one computes the rest only") {
  Bench bench;
  Answer answer;
  const Tokens prompt = prompt_of(5, 30);
  Tokens text = prompt;
  const Tokens first = continuation(prompt, 10);
  bench.engine->submit(asking(prompt, 10, answer)).wait();
  CHECK(answer.finish.cached_tokens == 0);
  text.insert(text.end(), first.begin(), first.end());
  text.push_back(50);
  Answer next;
  bench.engine->submit(asking(text, 5, next)).wait();
  CHECK(next.finish.cached_tokens == 39);  // the last new token was never computed
  CHECK(next.tokens == continuation(text, 5));
  Answer again;  // all of it is there: the last token is computed again
  bench.engine->submit(asking(prompt, 10, again)).wait();
  CHECK(again.finish.cached_tokens == 29);
  CHECK(again.tokens == first);
}

TEST_CASE("idle slots with long caches are not computed between others") {
  for (const bool heavy : {true, false}) {  // weights, against the cache between
    Setting setting;
    setting.slots = 3;
    setting.weights = heavy ? 1000 : 10;
    Bench bench(setting);
    std::vector<Answer> answers(4);
    bench.watch.hold(true);
    const Handle first = bench.engine->submit(asking({1}, 40, answers[0]));
    bench.watch.wait_for_calls(1);
    const Handle between = bench.engine->submit(asking(prompt_of(1, 30), 1, answers[1]));
    const Handle last = bench.engine->submit(asking({2}, 30, answers[2]));
    bench.watch.hold(false);
    first.wait();
    between.wait();
    last.wait();
    CHECK(answers[0].tokens == continuation({1}, 40));
    CHECK(answers[2].tokens == continuation({2}, 30));
    const auto three = std::count_if(bench.watch.calls.begin(), bench.watch.calls.end(),
                                     [](const auto& call) { return call.size() == 3; });
    CHECK((three > 20) == heavy);
    CHECK((three == 0) == !heavy);
  }
}

TEST_CASE("a request that was cancelled during a call gets no token of it") {
  for (const size_t call : {1, 3}) {  // the prompt, a later one
    Bench bench;
    Answer answer;
    bench.watch.hold(true);
    Handle handle = bench.engine->submit(asking({4}, 30, answer));
    for (size_t i = 1; i < call; ++i) {
      bench.watch.wait_for_calls(i);
      bench.watch.pass(i);
    }
    bench.watch.wait_for_calls(call);
    handle.cancel();
    bench.watch.hold(false);
    CHECK(handle.wait().reason == Reason::cancelled);
    CHECK(answer.tokens == continuation({4}, call - 1));
  }
}

TEST_CASE("a handle answers on any thread when its engine is gone") {
  Bench bench;
  Answer answer;
  const Handle handle = bench.engine->submit(asking({4}, 3, answer));
  bench.engine.reset();
  for (int i = 0; i < 20; ++i) {  // of which one has the number of the engine's
    std::string refused;
    std::thread([&] { refused = message([&] { handle.wait(); }); }).join();
    CHECK(refused.empty());
  }
}

TEST_CASE("the engine's own time has the choice of slots in it, and no waiting") {
  Bench bench;
  Answer answer;
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  bench.engine->submit(asking({4}, 3, answer)).wait();
  bench.engine->drain();
  const Stats stats = bench.engine->stats();
  CHECK(stats.engine_s > 0);
  CHECK(stats.engine_s < 0.15);
}

TEST_CASE("queue, drain and the end of an engine") {
  Setting setting;
  setting.slots = 1;
  setting.engine.queue = 2;
  Bench bench(setting);
  std::vector<Answer> answers(5);
  bench.watch.hold(true);
  const Handle running = bench.engine->submit(asking({1}, 5, answers[0]));
  bench.watch.wait_for_calls(1);
  const Handle second = bench.engine->submit(asking({2}, 5, answers[1]));
  const Handle third = bench.engine->submit(asking({3}, 5, answers[2]));
  CHECK_THROWS_AS(bench.engine->submit(asking({4}, 5, answers[3])), QueueFull);
  CHECK(message([&] { bench.engine->submit(asking({4}, 5, answers[3])); }) ==
        "engine: got 2 requests waiting, expected fewer than 2. Try again later, or load with more "
        "slots.");
  CHECK(bench.engine->stats().queued == 2);
  CHECK(bench.engine->stats().running == 1);
  std::thread drain([&] { bench.engine->drain(); });
  while (message([&] { bench.engine->submit(asking({4}, 5, answers[3])); }).find("draining") ==
         std::string::npos) {
  }
  CHECK_THROWS_AS(bench.engine->submit(asking({4}, 5, answers[3])), Draining);
  bench.watch.hold(false);
  drain.join();
  CHECK(running.done());
  CHECK(third.done());
  CHECK(answers[2].tokens == continuation({3}, 5));
  bench.engine.reset();

  bench.engine.emplace(bench.model);  // the model can have another engine then
  CHECK(
      message([&] { Engine other(bench.model); }) ==
      "engine: got a model that has an engine, expected one without. Use that engine, or load the "
      "model again.");
  const Handle last = bench.engine->submit(asking({5}, 60, answers[4]));
  bench.engine.reset();
  CHECK(last.done());
  CHECK(answers[4].tokens ==
        continuation({5}, static_cast<size_t>(answers[4].finish.completion_tokens)));
}

TEST_CASE("callbacks may submit, and may not wait for their own engine") {
  Bench bench;
  Answer inner;
  std::string refused, refused_drain;
  Handle outer_handle, inner_handle;
  Request outer;
  outer.tokens = {6};
  outer.on_finish = [&](const Finish&) {
    inner_handle = bench.engine->submit(asking({7}, 3, inner));
    refused = message([&] { inner_handle.wait(); });
    refused_drain = message([&] { bench.engine->drain(); });
  };
  bench.engine->submit(outer).wait();
  inner_handle.wait();
  CHECK(inner.tokens == continuation({7}, 3));
  CHECK(refused ==
        "Handle::wait: got a call on the engine's thread, expected another. Use on_finish in "
        "callbacks.");
  CHECK(refused_drain ==
        "Engine::drain: got a call on the engine's thread, expected another. Call it outside of "
        "callbacks.");
}

TEST_CASE("requests that cannot be run are refused with the reason") {
  Bench bench;
  const auto refused = [&](const std::function<void(Request&)>& change) {
    Request request;
    request.tokens = {1, 2};
    change(request);
    return message([&] { bench.engine->submit(std::move(request)); });
  };
  CHECK(refused([](Request& r) { r.tokens.clear(); }) ==
        "prompt: got no tokens, expected at least one. Give some text.");
  CHECK(refused([](Request& r) { r.tokens.assign(64, 1); }) ==
        "prompt: got 64 tokens, expected fewer than the context of 64. Give a shorter prompt, or "
        "load or export with a larger context.");
  CHECK(refused([](Request& r) { r.tokens = {1, 97}; }) ==
        "prompt: got token 97, expected 0 to 96. Encode the text with the model's own tokenizer.");
  CHECK(refused([](Request& r) { r.tokens = {-1}; }) ==
        "prompt: got token -1, expected 0 to 96. Encode the text with the model's own tokenizer.");
  CHECK(refused([](Request& r) { r.max_new_tokens = 0; }) ==
        "max_new_tokens: got 0, expected at least 1. Give such a number.");
  CHECK(refused([](Request& r) { r.stop = {"a", ""}; }) ==
        "stop: got an empty string, expected text. Leave it out.");
  CHECK(refused([](Request& r) { r.sampling.temperature = -1; }) ==
        "temperature: got -1, expected 0 to 100. Give such a number; 0 takes the best token, 1 the "
        "model's own odds.");
  CHECK(refused([](Request& r) { r.sampling.top_p = 0; }) ==
        "top_p: got 0, expected more than 0 and at most 1. Give such a number; 1 draws among all "
        "tokens.");
  CHECK(refused([](Request& r) { r.sampling.min_p = std::stof("nan"); }) ==
        "min_p: got nan, expected 0 to 1. Give such a number; 0 draws among all tokens.");
  CHECK(refused([](Request& r) { r.sampling.logit_bias = {{97, 1.0f}}; }) ==
        "logit_bias: got 97, expected a token of 0 to 96. Give ids of the model's own tokens.");
  CHECK(refused([](Request& r) { r.sampling.logprobs = 21; }) ==
        "logprobs: got 21, expected -1 to 20. Give such a number; -1 reports none.");
}

TEST_CASE("logits that are no numbers are refused, wherever one is") {
  const float infinity = std::numeric_limits<float>::infinity();
  for (const float value : {infinity, -infinity, std::numeric_limits<float>::quiet_NaN()}) {
    for (size_t at = 0; at < kVocab; ++at) {
      std::vector<float> logits(kVocab, 1.0f);
      Sampler sampler({}, kVocab, {1});
      CHECK(sampler.choose(logits.data()).id == 0);
      logits[at] = value;
      CHECK(message([&] { sampler.choose(logits.data()); }) ==
            "logits: got NaN or Inf, expected finite numbers. Export with --dtype bfloat16 or "
            "float32, which hold larger numbers.");
    }
  }
}

TEST_CASE("the best token is the first of the largest, in vocabularies of any size") {
  for (const int vocab : {1, 15, 16, 17, 97}) {
    for (int at = 0; at < vocab; ++at) {
      std::vector<float> logits(static_cast<size_t>(vocab), -3.0f);
      logits[static_cast<size_t>(at)] = logits.back() = -2.0f;
      CHECK(Sampler({}, vocab, {}).choose(logits.data()).id == at);
    }
  }
}

TEST_CASE("stop strings in text that comes in any pieces") {
  const std::string text = "aabaabaaab";
  for (unsigned cuts = 0; cuts < 1u << (text.size() - 1); ++cuts) {
    Stops stops({"aaab", "zz"});
    std::string shown, piece;
    for (size_t i = 0; i < text.size(); ++i) {
      piece += text[i];
      if (i + 1 == text.size() || (cuts >> i & 1)) {
        shown += stops.push(piece);
        piece.clear();
      }
    }
    CHECK(shown + stops.finish() == "aabaab");
    CHECK(stops.found() == "aaab");
  }
}
