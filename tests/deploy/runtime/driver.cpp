// Does what comes as JSON on stdin, and prints what came of it as JSON: requests on a model, tokens
// chosen from given logits, or what is said of folders.
#include <fstream>
#include <iostream>
#include <mutex>
#include <nlohmann/json.hpp>

#include "anybit/anybit.hpp"
#include "artifact.hpp"
#include "core/cpu/machine.h"
#include "sampler.hpp"

using Json = nlohmann::json;

namespace {

anybit::Sampling sampling(const Json& from) {
  anybit::Sampling made;
  made.temperature = from.value("temperature", made.temperature);
  made.top_k = from.value("top_k", made.top_k);
  made.top_p = from.value("top_p", made.top_p);
  made.min_p = from.value("min_p", made.min_p);
  made.repetition_penalty = from.value("repetition_penalty", made.repetition_penalty);
  made.presence_penalty = from.value("presence_penalty", made.presence_penalty);
  made.frequency_penalty = from.value("frequency_penalty", made.frequency_penalty);
  made.seed = from.value("seed", made.seed);
  made.logprobs = from.value("logprobs", made.logprobs);
  made.logit_bias = from.value("logit_bias", made.logit_bias);
  return made;
}

Json card(const anybit::Card& card) {
  return {{"name", card.name},
          {"family", card.family},
          {"scheme", card.scheme},
          {"max_context", card.max_context},
          {"vocab", card.vocab},
          {"end_tokens", card.end_tokens},
          {"backend", card.backend},
          {"choice", card.choice},
          {"cache_form", card.cache_form},
          {"proof", card.proof},
          {"verified", card.verified},
          {"memory", card.memory.text()},
          {"cache", card.memory.cache},
          {"second_cache", card.memory.second_cache},
          {"logits", card.memory.logits},
          {"copies", card.memory.copies},
          {"graphs", card.memory.graphs},
          {"total", card.memory.total()},
          {"threads", card.threads}};
}

Json stats(const anybit::Stats& stats) {
  return {{"queued", stats.queued},
          {"running", stats.running},
          {"prompt_tokens", stats.prompt_tokens},
          {"cached_tokens", stats.cached_tokens},
          {"completion_tokens", stats.completion_tokens},
          {"stopped", stats.stopped},
          {"full", stats.full},
          {"cancelled", stats.cancelled},
          {"failed", stats.failed},
          {"steps", stats.steps},
          {"model_s", stats.model_s},
          {"engine_s", stats.engine_s}};
}

struct Result {
  std::vector<anybit::Token> tokens;
  anybit::Finish finish;
  std::string error;
};

Json shown(const Result& result) {
  Json tokens = Json::array(), texts = Json::array(), logprobs = Json::array(), top = Json::array();
  for (const anybit::Token& token : result.tokens) {
    tokens.push_back(token.id);
    texts.push_back(token.text);
    logprobs.push_back(token.logprob);
    top.push_back(token.top);
  }
  const anybit::Finish& finish = result.finish;
  return {{"error", result.error},
          {"tokens", tokens},
          {"texts", texts},
          {"logprobs", logprobs},
          {"top", top},
          {"reason", name(finish.reason)},
          {"detail", finish.detail},
          {"text", finish.text},
          {"prompt_tokens", finish.prompt_tokens},
          {"cached_tokens", finish.cached_tokens},
          {"completion_tokens", finish.completion_tokens},
          {"prefill_s", finish.prefill_s},
          {"decode_s", finish.decode_s}};
}

// Bytes of the process's memory that no file has.
size_t anonymous() {
  std::ifstream file("/proc/self/status");
  for (std::string line; std::getline(file, line);) {
    if (line.compare(0, 8, "RssAnon:") == 0) return std::stoul(line.substr(8)) << 10;
  }
  return 0;
}

Json run(const Json& task) {
  anybit::LoadOptions load;
  const Json options = task.value("load", Json::object());
  load.backend = options.value("backend", load.backend);
  load.slots = options.value("slots", load.slots);
  load.threads = options.value("threads", load.threads);
  load.capacity = options.value("capacity", load.capacity);
  load.chunk = options.value("chunk", load.chunk);
  load.memory_limit = options.value("memory_limit", load.memory_limit);
  load.verify = options.value("verify", load.verify);
  load.onnxruntime = options.value("onnxruntime", "");
  load.kernels = options.value("kernels", "");
  load.tensorrt = options.value("tensorrt", "");
  load.cuda_graphs = options.value("cuda_graphs", load.cuda_graphs);
  anybit::EngineOptions engine_options;
  engine_options.reuse_prefixes = task.value("reuse_prefixes", true);
  engine_options.queue = task.value("queue", engine_options.queue);

  const auto model = anybit::Model::load(task.at("folder").get<std::string>(), load);
  anybit::Engine engine(model, engine_options);
  Json rounds = Json::array();
  for (const Json& round : task.at("rounds")) {  // requests of a round run at once
    std::vector<Result> results(round.size());
    std::vector<anybit::Handle> handles(round.size());
    std::mutex together;  // no request ends before all are there
    together.lock();
    for (size_t i = 0; i < round.size(); ++i) {
      const Json& asked = round[i];
      anybit::Request request;
      request.tokens = asked.value("tokens", request.tokens);
      request.text = asked.value("text", request.text);
      request.max_new_tokens = asked.value("max_new_tokens", request.max_new_tokens);
      request.sampling = sampling(asked);
      request.stop = asked.value("stop", request.stop);
      request.stop_tokens = asked.value("stop_tokens", request.stop_tokens);
      request.ignore_end = asked.value("ignore_end", false);
      const size_t cancel_after = asked.value("cancel_after", size_t{0});
      request.on_token = [&, i, cancel_after](const anybit::Token& token) {
        const std::lock_guard wait(together);
        results[i].tokens.push_back(token);
        if (results[i].tokens.size() == cancel_after) handles[i].cancel();
      };
      try {
        handles[i] = engine.submit(std::move(request));
      } catch (const anybit::Error& error) {
        results[i].error = error.what();
      }
    }
    together.unlock();
    Json shown_round = Json::array();
    for (size_t i = 0; i < round.size(); ++i) {
      if (handles[i].id() > 0) results[i].finish = handles[i].wait();
      shown_round.push_back(shown(results[i]));
    }
    rounds.push_back(shown_round);
  }
  return {{"card", card(model->card())},
          {"stats", stats(engine.stats())},
          {"rounds", rounds},
          {"anonymous", anonymous()}};
}

// {"prompt": [...], "sampling": {...}, "logits": [[...] ...]} -> the token, its log probability and the
// best ones for each row.
Json choose(const Json& task) {
  const auto logits = task.at("logits").get<std::vector<std::vector<float>>>();
  const auto prompt = task.at("prompt").get<std::vector<int32_t>>();
  anybit::Sampler sampler(sampling(task.at("sampling")), static_cast<int>(logits.at(0).size()),
                          prompt);
  Json choices = Json::array();
  for (const auto& row : logits) {
    const anybit::Choice choice = sampler.choose(row.data());
    choices.push_back({{"id", choice.id}, {"logprob", choice.logprob}, {"top", choice.top}});
  }
  return choices;
}

// {"describe": [folders]} -> the error of each, "" where its description is good.
Json describe(const Json& task) {
  Json errors = Json::array();
  for (const Json& folder : task.at("describe")) {
    try {
      anybit::Artifact(folder.get<std::string>());
      errors.push_back("");
    } catch (const anybit::Error& error) {
      errors.push_back(error.what());
    }
  }
  return errors;
}

// {"machine": [proc, control]} -> the cores and the memory that the process may use there.
Json machine(const Json& task) {
  const anybit::cpu::Machine there{task.at("machine").at(0).get<std::string>(),
                                   task.at("machine").at(1).get<std::string>()};
  return {anybit::cpu::usable_cores(there), anybit::cpu::free_memory(there)};
}

}  // namespace

int main() {
  try {
    const Json task = Json::parse(std::cin);
    const Json done = task.contains("logits")     ? choose(task)
                      : task.contains("describe") ? describe(task)
                      : task.contains("machine")  ? machine(task)
                                                  : run(task);
    std::cout << done.dump() << std::endl;
  } catch (const std::exception& error) {
    std::cerr << error.what() << std::endl;
    return 2;
  }
  return 0;
}
