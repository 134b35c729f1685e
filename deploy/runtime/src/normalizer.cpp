// Reads normalizers and carries them out.
#include "normalizer.hpp"

#include <map>
#include <memory>

#include "pattern.hpp"
#include "unicode.hpp"

namespace anybit {
namespace {

std::string stripped(std::string_view text, bool left, bool right) {
  size_t begin = 0, end = text.size();
  while (left && begin < end && unicode::is_space(unicode::code_at(text.data() + begin))) {
    begin += unicode::length_of(text[begin]);
  }
  while (right && end > begin) {
    size_t last = end - 1;
    while (unicode::is_continuation(text[last])) --last;
    if (!unicode::is_space(unicode::code_at(text.data() + last))) break;
    end = last;
  }
  return std::string(text.substr(begin, end - begin));
}

}  // namespace

Normalizer::Normalizer(const Field& field) {
  if (!field.is_null()) read(field, 0);
}

void Normalizer::read(const Field& field, int depth) {
  static const std::map<std::string, unicode::Form> kForms = {{"NFC", unicode::Form::nfc},
                                                              {"NFD", unicode::Form::nfd},
                                                              {"NFKC", unicode::Form::nfkc},
                                                              {"NFKD", unicode::Form::nfkd}};
  const std::string kind = field.at("type").text();
  if (depth > kMostDepth) field.refuse("no more than 16 sequences in each other");
  if (kind == "Sequence") {
    const Field all = field.at("normalizers");
    for (size_t i = 0, count = all.items(); i < count; ++i) read(all.at(i), depth + 1);
  } else if (const auto form = kForms.find(kind); form != kForms.end()) {
    steps_.push_back(
        [form = form->second](std::string text) { return unicode::normalize(text, form); });
  } else if (kind == "Prepend") {
    steps_.push_back([prefix = field.at("prepend").text()](std::string text) {
      return text.empty() ? text : prefix + text;
    });
  } else if (kind == "Replace") {
    const auto pattern = std::make_shared<const Pattern>(field.at("pattern"));
    steps_.push_back([pattern, content = field.at("content").text()](std::string text) {
      return pattern->replaced(text, content);
    });
  } else if (kind == "Strip") {
    const bool left = field.at("strip_left").flag(true), right = field.at("strip_right").flag(true);
    steps_.push_back([left, right](std::string text) { return stripped(text, left, right); });
  } else {
    field.at("type").refuse(
        "a normalizer of Sequence, Prepend, Replace, NFC, NFD, NFKC, NFKD, Strip");
  }
}

std::string Normalizer::apply(std::string_view text) const {
  std::string done(text);
  for (const auto& step : steps_) done = step(std::move(done));
  return done;
}

}  // namespace anybit
