// Reads chat.json and puts prompts together; exporter/chat.py says what its fields mean.
#include "anybit/chat.hpp"

#include <algorithm>
#include <ctime>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "anybit/error.hpp"
#include "json.hpp"
#include "unicode.hpp"

namespace anybit {
namespace {

constexpr int32_t kChatFormat = 1;
const std::string kChatFix = "Export the model again with this version";

// A text with dates in it: texts, and between them formats of strftime.
using Dated = std::vector<std::string>;

Dated read_dated(const Field& field) {
  if (field.value().is_string()) return {field.text()};
  Dated parts;
  for (size_t i = 0, count = field.items(); i < count; ++i) {
    const Field part = field.at(i);
    parts.push_back(part.text());
    if (i % 2 == 0) continue;
    const std::string& format = parts.back();
    for (size_t at = format.find('%'); at != format.npos; at = format.find('%', at + 2)) {
      const bool known = at + 1 < format.size() &&
                         std::string_view("aAbBdHIjmMpSyY%").find(format[at + 1]) != format.npos;
      if (!known) part.refuse("a format of dates");
    }
  }
  if (parts.size() % 2 == 0) field.refuse("a text, or texts and formats of dates in turn");
  return parts;
}

std::map<std::string, Dated> read_ends(const Field& field) {
  std::map<std::string, Dated> ends;
  for (const std::string& role : field.names()) ends[role] = read_dated(field.at(role));
  return ends;
}

std::string filled(const Dated& parts) {
  std::string text;
  for (size_t i = 0; i < parts.size(); ++i) {
    if (i % 2 == 0 || parts[i].empty()) {
      text += parts[i];
      continue;
    }
    const std::time_t now = std::time(nullptr);
    std::tm local{};
    localtime_r(&now, &local);
    std::string room(64 + 32 * parts[i].size(), '\0');
    room.resize(std::strftime(room.data(), room.size(), parts[i].c_str(), &local));
    text += room;
  }
  return text;
}

// What a template does about a message: text before it, characters taken off the content's ends.
struct Turn {
  Dated before;
  std::set<char32_t> left, right;
};

// What is dropped of the assistant's messages that a later one of the user follows: all up to the last
// `end`, and characters behind it.
struct Thoughts {
  std::string end;  // "": nothing is
  std::set<char32_t> left;
};

std::set<char32_t> characters(const std::string& text) {
  std::set<char32_t> found;
  for (size_t at = 0; at < text.size(); at += unicode::length_of(text[at])) {
    found.insert(unicode::code_at(text.data() + at));
  }
  return found;
}

// Where the text begins behind such characters from `begin` on.
size_t behind(const std::string& text, size_t begin, const std::set<char32_t>& characters) {
  while (begin < text.size() && characters.count(unicode::code_at(text.data() + begin))) {
    begin += unicode::length_of(text[begin]);
  }
  return begin;
}

std::string without(const Thoughts& thoughts, const std::string& content) {
  const size_t found = content.rfind(thoughts.end);
  if (thoughts.end.empty() || found == content.npos) return content;
  return content.substr(behind(content, found + thoughts.end.size(), thoughts.left));
}

std::string stripped(const std::string& text, const Turn& turn) {
  const size_t begin = behind(text, 0, turn.left);
  size_t end = text.size();
  while (end > begin) {
    size_t last = end - 1;
    while (unicode::is_continuation(text[last])) --last;
    if (!turn.right.count(unicode::code_at(text.data() + last))) break;
    end = last;
  }
  return text.substr(begin, end - begin);
}

// Whether there is nothing but what Python's str.isspace() takes for space.
bool is_blank(const std::string& text) {
  for (size_t at = 0; at < text.size(); at += unicode::length_of(text[at])) {
    const char32_t code = unicode::code_at(text.data() + at);
    if (!unicode::is_space(code) && !(code >= 0x1c && code <= 0x1f)) return false;
  }
  return true;
}

}  // namespace

struct ChatTemplate::Data {
  std::string where, why_not;
  std::map<std::string, Turn> turns;  // "role>role", and "role>role." where the last one differs
  std::map<std::string, Dated> ends, generate;  // by the last role; the second asks for an answer
  std::map<std::string, std::string> refused;   // why, by "role>role"
  std::vector<std::string> unlike;  // contents with these are treated in ways of their own
  Thoughts thoughts;                // what is known about one of these words, but for a last answer
  bool empty = true;                // whether an empty content is like others
  bool system_before_last = false;  // the system's message stands before the last, the user's

  explicit Data(const Field& file) : where(file.where()) {
    if (file.at("format").value() != kChatFormat) {
      file.at("format").refuse(std::to_string(kChatFormat));
    }
    why_not = file.at("why_not").text("");
    if (!why_not.empty()) return;
    const Field all = file.at("turns");
    for (const std::string& name : all.names()) {
      const Field one = all.at(name);
      turns[name] = {read_dated(one.at("before")), characters(one.at("left").text()),
                     characters(one.at("right").text())};
    }
    ends = read_ends(file.at("end"));
    generate = read_ends(file.at("generate"));
    const Field why = file.at("refused");
    for (const std::string& name : why.names()) refused[name] = why.at(name).text();
    const Field words = file.at("unlike");
    for (size_t i = 0, count = words.items(); i < count; ++i) unlike.push_back(words.at(i).text());
    if (const Field dropped = file.at("thoughts"); !dropped.is_null()) {
      thoughts = {dropped.at("end").text(), characters(dropped.at("left").text())};
    }
    empty = file.at("empty").flag(true);
    system_before_last = file.at("system_before_last").flag(false);
  }

  // What stands in the prompt of a message's content, but for its ends.
  //
  // answered: whether a later message is the user's.
  std::string read(const Message& message, bool answered, const std::string& name) const {
    const std::string& content = message.content;
    constexpr const char* kOwnWay =
        ": the model's chat template treats it in a way of its own, which is not known here";
    if (!unicode::is_valid(content)) {
      throw Error(name, "got bytes that are not UTF-8, expected UTF-8", "Encode the text as UTF-8");
    }
    const bool assistant = message.role == "assistant";
    const std::string rest = assistant && answered ? without(thoughts, content) : content;
    if (!empty && is_blank(rest)) {
      throw Error(name, std::string("got no text, expected some") + kOwnWay,
                  "Leave the message out");
    }
    for (const std::string& word : unlike) {
      if (content.find(word) == content.npos) continue;
      if (word == thoughts.end && (answered || !assistant)) continue;
      throw Error(name, "got a text with " + printable(word) + ", expected one without" + kOwnWay,
                  "Take it out of the message");
    }
    return rest;
  }

  // What is done about the message of a role that comes after another ("" at the beginning).
  const Turn& turn(const std::string& before, const std::string& role, bool last,
                   const std::string& name) const {
    const std::string pair = before + ">" + role;
    const auto of_last = last ? turns.find(pair + ".") : turns.end();
    const auto found = of_last == turns.end() ? turns.find(pair) : of_last;
    if (found != turns.end()) return found->second;
    const auto why = refused.find(pair);
    throw Error(name,
                "got " + printable(role) +
                    (before.empty() ? " at the beginning" : " after " + before) +
                    ", expected messages that the model's chat template takes" +
                    (why == refused.end() ? "" : " (it says: " + why->second + ")"),
                "Send other roles, or the same in another order");
  }
};

ChatTemplate ChatTemplate::load(const std::filesystem::path& chat_json) {
  const std::string where = chat_json.string();
  return parse(read_file(where, kChatFix), where);
}

ChatTemplate ChatTemplate::parse(std::string_view json, const std::string& where) {
  const nlohmann::json file = parse_json(json, where, kChatFix);
  return ChatTemplate(std::make_shared<const Data>(Field(file, where, kChatFix)));
}

const std::string& ChatTemplate::why_not() const { return data_->why_not; }

std::string ChatTemplate::render(const std::vector<Message>& messages,
                                 bool generation_prompt) const {
  return prompt(messages, generation_prompt).text;
}

Prompt ChatTemplate::prompt(const std::vector<Message>& messages, bool generation_prompt) const {
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
  const std::string& last = messages.back().role;
  const bool moves = data_->system_before_last && messages[0].role == "system";
  if (moves && last == "user") std::rotate(order.begin(), order.begin() + 1, order.end() - 1);
  size_t last_user = 0;
  for (size_t i = 0; i < messages.size(); ++i) {
    if (messages[i].role == "user") last_user = i;
  }
  Prompt prompt;
  std::string before;
  for (size_t i = 0; i < order.size(); ++i) {
    const std::string& role = messages[order[i]].role;
    const std::string name = "messages[" + std::to_string(order[i]) + "]";
    if (data_->system_before_last && order[i] > 0 && role == "system") {
      throw Error(name + ", role", "got system, expected it at the beginning alone",
                  "Send other roles, or the same in another order");
    }
    const Turn& turn = data_->turn(before, role, i + 1 == order.size(), name + ", role");
    const std::string content =
        data_->read(messages[order[i]], order[i] < last_user, name + ", content");
    prompt.text += filled(turn.before);
    const size_t begin = prompt.text.size();
    prompt.text += stripped(content, turn);
    if (prompt.text.size() > begin) prompt.contents.emplace_back(begin, prompt.text.size());
    before = role;
  }
  const auto& ends = generation_prompt ? data_->generate : data_->ends;
  const auto end = ends.find(last);
  if (end == ends.end() || (moves && last != "user")) {
    throw Error("messages", "got " + printable(last) + " as the last role, expected another",
                "End with a message of the user");
  }
  prompt.text += filled(end->second);
  return prompt;
}

}  // namespace anybit
