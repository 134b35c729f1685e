// Lets each function of the simulated TensorRT and driver fail once, as the task on stdin says, and
// prints as JSON what the runtime made of it.
#include <dlfcn.h>

#include <iostream>
#include <nlohmann/json.hpp>

#include "anybit/anybit.hpp"

using Json = nlohmann::json;

namespace {

template <class Function>
Function* symbol(void* library, const char* name) {
  return reinterpret_cast<Function*>(dlsym(library, name));
}

std::vector<anybit::Handle> submit(anybit::Engine& engine, const Json& prompts,
                                   std::vector<std::vector<int32_t>>& tokens) {
  std::vector<anybit::Handle> handles;
  tokens.resize(prompts.size());
  for (size_t i = 0; i < prompts.size(); ++i) {
    anybit::Request request;
    request.tokens = prompts[i].get<std::vector<int32_t>>();
    request.max_new_tokens = 6;
    request.ignore_end = true;
    request.on_token = [&tokens, i](const anybit::Token& token) { tokens[i].push_back(token.id); };
    handles.push_back(engine.submit(std::move(request)));
  }
  return handles;
}

Json finished(anybit::Engine& engine, const Json& prompts) {
  std::vector<std::vector<int32_t>> tokens;
  Json found = Json::array();
  std::vector<anybit::Handle> handles;
  try {
    handles = submit(engine, prompts, tokens);
  } catch (const anybit::Error& error) {
    return {{{"reason", "refused"}, {"detail", error.what()}, {"tokens", Json::array()}}};
  }
  for (size_t i = 0; i < handles.size(); ++i) {
    const anybit::Finish finish = handles[i].wait();
    found.push_back(
        {{"reason", name(finish.reason)}, {"detail", finish.detail}, {"tokens", tokens[i]}});
  }
  return found;
}

}  // namespace

int main() {
  const Json task = Json::parse(std::cin);
  const std::string library = task.at("library");
  void* const simulation = dlopen(library.c_str(), RTLD_NOW);
  if (!simulation) return 3;
  const auto plan = symbol<void(const char*, int, int, int)>(simulation, "sim_plan");
  const auto calls = symbol<int(const char*)>(simulation, "sim_calls");
  const auto live = symbol<int()>(simulation, "sim_live");
  const auto get_context = symbol<int(void**)>(simulation, "cuCtxGetCurrent");
  anybit::LoadOptions load;
  load.backend = "tensorrt";
  load.slots = 3;
  load.chunk = 16;
  load.tensorrt = library;
  Json outcomes = Json::array();
  for (const Json& step : task.at("steps")) {
    const std::string function = step.at("function");
    plan(function.c_str(), step.at("nth"), step.at("status"), step.at("sticky"));
    Json outcome = step;
    load.memory_limit = step.value("memory_limit", size_t{0});
    try {
      const auto model = anybit::Model::load(task.at("folder").get<std::string>(), load);
      outcome["calls_to_load"] = calls(function.c_str());
      void* context = nullptr;
      get_context(&context);
      outcome["kept"] = context == nullptr;
      anybit::Engine engine(model);
      outcome["during"] = finished(engine, task.at("prompts"));
      outcome["afterwards"] = finished(engine, task.at("prompts"));
      outcome["calls"] = calls(function.c_str());
    } catch (const anybit::Error& error) {
      outcome["load"] = error.what();
    }
    void* context = nullptr;
    get_context(&context);
    outcome["kept_at_the_end"] = context == nullptr;
    outcome["live"] = live();
    outcomes.push_back(outcome);
  }
  std::cout << outcomes.dump() << std::endl;
  return 0;
}
