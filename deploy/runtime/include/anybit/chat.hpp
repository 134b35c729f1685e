// Conversations to prompts, as the model's chat template says; exporter/chat.py has turned it into
// data, so that no template engine is needed here.
#pragma once

#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#pragma GCC visibility push(default)
namespace anybit {

struct Message {
  std::string role;     // "system", "user" or "assistant"
  std::string content;  // UTF-8
};

// A rendered conversation.
struct Prompt {
  std::string text;
  // Begin and end, in bytes, of each content in it: what somebody else than the template wrote.
  // In order; none is empty.
  std::vector<std::pair<size_t, size_t>> contents;
};

// Copies share what they hold; every function may be called from several threads at once.
class ChatTemplate {
 public:
  // Reads chat.json beside the model. A model without a template, or with one that cannot be said as
  // data, loads too, and why_not() says why it renders nothing.
  //
  // Throws Error: the file is missing, damaged or of another format.
  static ChatTemplate load(const std::filesystem::path& chat_json);

  // The same of the file's content; `where` stands in messages.
  static ChatTemplate parse(std::string_view json, const std::string& where = "chat.json");

  // Why every render() throws; "" where it works.
  const std::string& why_not() const;

  // The text to encode with add_special = false: the template has its own special tokens.
  //
  // generation_prompt: end with what comes before an answer.
  //
  // Throws Error: why_not(); no messages; a role that the template does not take, or not in that
  // place; a content that it treats in a way of its own, such as one with a tag of reasoning in it.
  std::string render(const std::vector<Message>& messages, bool generation_prompt = true) const;

  // The same, to encode with contents as plain text: see Tokenizer::encode().
  Prompt prompt(const std::vector<Message>& messages, bool generation_prompt = true) const;

 private:
  struct Data;
  explicit ChatTemplate(std::shared_ptr<const Data> data) : data_(std::move(data)) {}
  std::shared_ptr<const Data> data_;
};

}  // namespace anybit
#pragma GCC visibility pop
