// The model of the targets that read requests.
#include <nlohmann/json.hpp>

#include "fuzz.hpp"
#include "parts.hpp"

namespace anybit::fuzz {
namespace {

using Json = nlohmann::json;

Tokenizer bytes_alone() {
  Json vocab{{"<unk>", 0}};
  for (int byte = 0; byte < 256; ++byte) {
    char name[8];
    std::snprintf(name, sizeof name, "<0x%02X>", byte);
    vocab[name] = byte + 1;
  }
  const Json end{{"id", 257}, {"content", "<end>"}, {"special", true}, {"normalized", false}};
  const Json file{
      {"added_tokens", {end}},
      {"normalizer", nullptr},
      {"pre_tokenizer", nullptr},
      {"post_processor", nullptr},
      {"decoder",
       {{"type", "Sequence"}, {"decoders", {{{"type", "ByteFallback"}}, {{"type", "Fuse"}}}}}},
      {"model",
       {{"type", "BPE"},
        {"vocab", vocab},
        {"merges", Json::array()},
        {"byte_fallback", true},
        {"unk_token", "<unk>"}}}};
  return Tokenizer::parse(file.dump());
}

ChatTemplate turns() {
  Json all = Json::object(), ends = Json::object();
  for (const char* before : {"", "system", "user", "assistant"}) {
    for (const char* role : {"system", "user", "assistant"}) {
      all[std::string(before) + ">" + role] = {
          {"before", std::string("[") + role + "]"}, {"left", " \n"}, {"right", " \n"}};
      ends[role] = "<end>";
    }
  }
  const Json file{{"format", 1},
                  {"turns", all},
                  {"end", ends},
                  {"generate", ends},
                  {"empty", true},
                  {"system_before_last", false},
                  {"thoughts", {{"end", "</think>"}, {"left", "\n"}}},
                  {"refused", {{"system>system", "two of them"}}},
                  {"unlike", {"[INST]"}}};
  return ChatTemplate::parse(file.dump());
}

}  // namespace

const Model& small_model() {
  static const Model model([] {
    auto parts = std::make_unique<Model::Parts>();
    parts->card.name = "small";
    parts->card.vocab = 258;
    parts->card.context = parts->card.max_context = 64;
    parts->card.slots = 1;
    parts->tokenizer.value.emplace(bytes_alone());
    parts->chat.value.emplace(turns());
    return parts;
  }());
  return model;
}

}  // namespace anybit::fuzz
