// Finds and replaces patterns.
#include "pattern.hpp"

namespace anybit {

Pattern::Pattern(const Field& field) {
  if (const Field string = field.at("String"); !string.is_null()) {
    string_ = string.text();
    if (string_.empty()) string.refuse("a string that is not empty");
    return;
  }
  const Field regex = field.at("Regex");
  if (regex.is_null()) field.refuse("an object with String or Regex");
  regex_.emplace(regex.text(), regex.where());
}

Pattern::Pattern(const std::string& regex, const std::string& where) {
  regex_.emplace(regex, where);
}

void Pattern::find_all(std::string_view text, std::vector<Regex::Match>& found) const {
  if (regex_) {
    regex_->find_all(text, found);
    return;
  }
  for (size_t at = text.find(string_); at != text.npos; at = text.find(string_, at)) {
    found.push_back({at, at + string_.size()});
    at += string_.size();
  }
}

std::string Pattern::replaced(std::string_view text, std::string_view content) const {
  std::vector<Regex::Match> found;
  find_all(text, found);
  std::string out;
  out.reserve(text.size() + found.size() * content.size());
  size_t done = 0;
  for (const auto& [begin, end] : found) {
    out += text.substr(done, begin - done);
    out += content;
    done = end;
  }
  out += text.substr(done);
  return out;
}

bool Pattern::is_character() const {
  return !regex_ && string_.size() == unicode::length_of(string_[0]);
}

}  // namespace anybit
