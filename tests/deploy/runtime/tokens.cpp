// Answers requests about a tokenizer and a chat template, one JSON object a line:
// {"parse": text}, {"load": path}, {"encode": bytes in hex, "special": bool}, {"encode": bytes in
// hex, "plain": pairs}, {"decode": ids, "skip": bool}, {"stream": ids, "skip": bool}, {"bytes": ids}, {"time": texts in hex}, {"chat": text},
// {"render": messages, "generation": bool}, {"prompt": the same}. The answer is {"ok": ...}, or {"error": [where, problem, fix]}.
#include <chrono>
#include <iostream>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "anybit/chat.hpp"
#include "anybit/error.hpp"
#include "anybit/tokenizer.hpp"

namespace {

using Json = nlohmann::json;

std::optional<anybit::Tokenizer> tokenizer;
std::optional<anybit::ChatTemplate> chat;

std::string from_hex(const std::string& hex) {
  std::string bytes;
  for (size_t i = 0; i + 1 < hex.size(); i += 2) {
    bytes += static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16));
  }
  return bytes;
}

std::string to_hex(const std::string& bytes) {
  std::string hex;
  for (const unsigned char byte : bytes) {
    hex += "0123456789abcdef"[byte >> 4];
    hex += "0123456789abcdef"[byte & 15];
  }
  return hex;
}

Json streamed(const std::vector<int32_t>& ids, bool skip) {
  Json parts = Json::array();
  anybit::Tokenizer::Stream stream = tokenizer->stream(skip);
  for (const int32_t id : ids) parts.push_back(stream.push(id));
  parts.push_back(stream.finish());
  return parts;
}

// Seconds that encoding these texts one after the other takes.
double timed(const std::vector<std::string>& hex) {
  std::vector<std::string> texts;
  for (const std::string& one : hex) texts.push_back(from_hex(one));
  size_t tokens = 0;
  const auto began = std::chrono::steady_clock::now();
  for (const std::string& one : texts) tokens += tokenizer->encode(one, false).size();
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - began;
  return tokens == 0 ? -1 : took.count();
}

Json answer(const Json& ask) {
  const bool skip = ask.value("skip", true);
  if (ask.contains("parse")) {
    tokenizer = anybit::Tokenizer::parse(ask["parse"].get<std::string>());
    return tokenizer->vocab();
  }
  if (ask.contains("load")) {
    tokenizer = anybit::Tokenizer::load(ask["load"].get<std::string>());
    return tokenizer->vocab();
  }
  if (ask.contains("encode")) {
    const std::string text = from_hex(ask["encode"]);
    if (!ask.contains("plain")) return tokenizer->encode(text, ask.value("special", true));
    return tokenizer->encode(text, ask["plain"].get<std::vector<std::pair<size_t, size_t>>>());
  }
  if (ask.contains("time")) return timed(ask["time"]);
  if (ask.contains("decode")) return tokenizer->decode(ask["decode"], skip);
  if (ask.contains("stream")) return streamed(ask["stream"], skip);
  if (ask.contains("bytes")) {
    Json parts = Json::array();
    for (const int32_t id : ask["bytes"]) parts.push_back(to_hex(tokenizer->bytes(id)));
    return parts;
  }
  if (ask.contains("chat")) {
    chat = anybit::ChatTemplate::parse(ask["chat"].get<std::string>());
    return chat->why_not();
  }
  std::vector<anybit::Message> messages;
  const Json& list = ask.contains("prompt") ? ask["prompt"] : ask["render"];
  for (const Json& one : list) messages.push_back({one["role"], one["content"]});
  const bool generation = ask.value("generation", true);
  if (ask.contains("render")) return chat->render(messages, generation);
  const anybit::Prompt prompt = chat->prompt(messages, generation);
  return {prompt.text, prompt.contents};
}

}  // namespace

int main() {
  for (std::string line; std::getline(std::cin, line);) {
    Json said;
    try {
      said["ok"] = answer(Json::parse(line));
    } catch (const anybit::Error& error) {
      said["error"] = {error.where(), error.problem(), error.fix()};
    }
    std::cout << said.dump() << std::endl;
  }
}
