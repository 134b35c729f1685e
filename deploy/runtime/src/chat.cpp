// Reads chat.json and puts prompts together; exporter/chat.py says what its fields mean.
#include "anybit/chat.hpp"

#include <algorithm>
#include <map>
#include <optional>
#include <set>
#include <utility>

#include "anybit/error.hpp"
#include "json.hpp"
#include "unicode.hpp"

namespace anybit {
namespace {

constexpr int32_t kFormat = 1;
const std::string kFix = "Export the model again with this version";

using Texts = std::map<std::string, std::string>;

Texts read_texts(const Field& field) {
  if (!field.value().is_object()) field.refuse("an object");
  Texts texts;
  for (const auto& [name, value] : field.value().items()) texts[name] = field.at(name).text();
  return texts;
}

// Characters that a template takes off the ends of a content.
struct Strip {
  std::set<char32_t> left, right;
};

std::set<char32_t> characters(const std::string& text) {
  std::set<char32_t> found;
  for (size_t at = 0; at < text.size(); at += unicode::length_of(text[at])) {
    found.insert(unicode::code_at(text.data() + at));
  }
  return found;
}

std::string stripped(const std::string& text, const Strip& strip) {
  size_t begin = 0, end = text.size();
  while (begin < end && strip.left.count(unicode::code_at(text.data() + begin))) {
    begin += unicode::length_of(text[begin]);
  }
  while (end > begin) {
    size_t last = end - 1;
    while (unicode::is_continuation(text[last])) --last;
    if (!strip.right.count(unicode::code_at(text.data() + last))) break;
    end = last;
  }
  return text.substr(begin, end - begin);
}

}  // namespace

struct ChatTemplate::Data {
  std::string where, why_not;
  std::map<std::string, Strip> strip;  // by role: all that there are
  Texts between;   // "role>role", and "role>role." before the last message where that differs
  Texts end;       // by the last role
  Texts generate;  // the same, with what comes before an answer
  Texts refused;   // why, by "role>role"
  std::vector<std::string> unlike;  // contents with these are treated in ways of their own
  bool empty = true;                // whether an empty content is like others
  bool system_last = false;         // the system's message belongs before the last of the user

  explicit Data(const Field& file) : where(file.where()) {
    if (file.at("format").value() != kFormat) {
      file.at("format").refuse(std::to_string(kFormat));
    }
    why_not = file.at("why_not").text("");
    if (!why_not.empty()) return;
    const Field strips = file.at("strip");
    if (!strips.value().is_object()) strips.refuse("an object");
    for (const auto& [role, value] : strips.value().items()) {
      const Field one = strips.at(role);
      strip[role] = {characters(one.at("left").text()), characters(one.at("right").text())};
    }
    between = read_texts(file.at("between"));
    end = read_texts(file.at("end"));
    generate = read_texts(file.at("generate"));
    refused = read_texts(file.at("refused"));
    const Field words = file.at("unlike");
    for (size_t i = 0, count = words.items(); i < count; ++i) unlike.push_back(words.at(i).text());
    empty = file.at("empty").flag(true);
    system_last = file.at("system_last").flag(false);
  }

  std::string roles() const {
    std::string names;
    for (const auto& [role, ends] : strip) names += (names.empty() ? "" : ", ") + role;
    return names;
  }

  void check(const Message& message, const std::string& name) const {
    if (!strip.count(message.role)) {
      throw Error(name + ", role", "got " + printable(message.role) + ", expected " + roles(),
                  "Send a role that the model's chat template knows");
    }
    if (!unicode::is_valid(message.content)) {
      throw Error(name + ", content", "got bytes that are not UTF-8, expected UTF-8",
                  "Encode the text as UTF-8");
    }
    for (const std::string& word : unlike) {
      if (message.content.find(word) == message.content.npos) continue;
      throw Error(name + ", content",
                  "got a text with " + printable(word) +
                      ", expected one without: the model's chat template treats it in a way of its "
                      "own, which is not known here",
                  "Take it out of the message");
    }
  }

  // What stands before the message of a role that comes after another ("" at the beginning).
  const std::string& before(const std::string& previous, const std::string& role, bool last,
                            const std::string& name) const {
    const std::string pair = previous + ">" + role;
    const auto special = last ? between.find(pair + ".") : between.end();
    if (special != between.end()) return special->second;
    const auto found = between.find(pair);
    if (found != between.end()) return found->second;
    const auto why = refused.find(pair);
    throw Error(name,
                "got role " + role +
                    (previous.empty() ? " at the beginning" : " after " + previous) +
                    ", expected another order" + (why == refused.end() ? "" : ": " + why->second),
                "Send messages in an order that the model's chat template takes");
  }
};

ChatTemplate ChatTemplate::load(const std::filesystem::path& chat_json) {
  const std::string where = chat_json.string();
  return parse(read_file(where, kFix), where);
}

ChatTemplate ChatTemplate::parse(std::string_view json, const std::string& where) {
  const nlohmann::json file = parse_json(json, where, kFix);
  return ChatTemplate(std::make_shared<const Data>(Field(file, where, kFix)));
}

const std::string& ChatTemplate::why_not() const { return data_->why_not; }

std::string ChatTemplate::render(const std::vector<Message>& messages,
                                 bool generation_prompt) const {
  if (!data_->why_not.empty()) {
    throw Error(data_->where, data_->why_not,
                "Put the prompt together yourself, and send it as text");
  }
  if (messages.empty()) {
    throw Error("messages", "got none, expected one or more", "Send a message of the user");
  }
  // The messages in the order in which they stand in the prompt.
  std::vector<size_t> order(messages.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  if (data_->system_last && messages[0].role == "system") {
    size_t user = messages.size() - 1;
    while (user > 0 && messages[user].role != "user") --user;
    if (user > 0) std::rotate(order.begin(), order.begin() + 1, order.begin() + user);
  }
  std::string prompt, previous;
  for (size_t i = 0; i < order.size(); ++i) {
    const Message& message = messages[order[i]];
    const std::string name = "messages[" + std::to_string(order[i]) + "]";
    data_->check(message, name);
    const std::string content = stripped(message.content, data_->strip.at(message.role));
    if (content.empty() && !data_->empty) {
      throw Error(name + ", content",
                  "got an empty text, expected some: the model's chat template treats it in a way "
                  "of its own, which is not known here",
                  "Leave the message out");
    }
    prompt += data_->before(previous, message.role, i + 1 == order.size(), name) + content;
    previous = message.role;
  }
  const Texts& ends = generation_prompt ? data_->generate : data_->end;
  const auto found = ends.find(previous);
  if (found == ends.end()) {
    throw Error("messages", "got " + previous + " as the last role, expected another",
                "End with a message of the user");
  }
  return prompt + found->second;
}

}  // namespace anybit
