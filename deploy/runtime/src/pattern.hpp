// What tokenizer.json calls a pattern: a string or a regular expression, and what to put in its place.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "json.hpp"
#include "regex.hpp"

namespace anybit {

class Pattern {
 public:
  // Of {"String": ...} or {"Regex": ...}.
  //
  // Throws Error: it is neither, is empty, or has something that is not known here.
  explicit Pattern(const Field& field);
  // Of a regular expression.
  Pattern(const std::string& regex, const std::string& where);

  void find_all(std::string_view text, std::vector<Regex::Match>& found) const;

  std::string replaced(std::string_view text, std::string_view content) const;

  // Whether it is one character, which stands in no two pieces of a text.
  bool is_character() const;

 private:
  std::string string_;
  std::optional<Regex> regex_;
};

}  // namespace anybit
