// Reads added tokens and finds them in a text: the leftmost first, the longest of those.
#include "added_tokens.hpp"

#include <algorithm>

#include "unicode.hpp"

namespace anybit {
namespace {

// The character before a place; `at` > 0.
size_t begin_before(std::string_view text, size_t at) {
  do --at;
  while (unicode::is_continuation(text[at]));
  return at;
}

bool word_before(std::string_view text, size_t at) {
  return at > 0 && unicode::is_word(unicode::code_at(text.data() + begin_before(text, at)));
}

bool word_at(std::string_view text, size_t at) {
  return at < text.size() && unicode::is_word(unicode::code_at(text.data() + at));
}

size_t spaces_before(std::string_view text, size_t at) {
  while (at > 0) {
    const size_t begin = begin_before(text, at);
    if (!unicode::is_space(unicode::code_at(text.data() + begin))) break;
    at = begin;
  }
  return at;
}

size_t spaces_after(std::string_view text, size_t at) {
  while (at < text.size() && unicode::is_space(unicode::code_at(text.data() + at))) {
    at += unicode::length_of(text[at]);
  }
  return at;
}

}  // namespace

AddedTokens::AddedTokens(const Field& list, const Bpe& model, const Normalizer& normalizer) {
  if (list.is_null()) return;
  std::unordered_map<std::string, int32_t> known;
  // What the vocabulary lacks is numbered on from its end.
  int32_t next = static_cast<int32_t>(model.size());
  for (size_t i = 0, count = list.items(); i < count; ++i) {
    const Field one = list.at(i);
    const std::string& content = one.at("content").text();
    const int32_t said = one.at("id").number(kMostIds - 1);
    if (content.empty()) one.at("content").refuse("a token that is not empty");
    if (!known.emplace(content, said).second) one.at("content").refuse("each token once");
    const std::optional<int32_t> id = model.id(content);
    const int32_t expected = id ? *id : next;
    if (said != expected) one.at("id").refuse(std::to_string(expected));
    if (!id) ++next;
    tokens_[said] = {content, one.at("single_word").flag(false), one.at("lstrip").flag(false),
                     one.at("rstrip").flag(false), one.at("special").flag(false)};
    if (one.at("normalized").flag(!tokens_[said].special)) {
      normalized_.add(normalizer.apply(content), said);
    } else {
      raw_.add(content, said);
    }
  }
}

void AddedTokens::Trie::add(std::string_view word, int32_t id) {
  if (word.empty()) return;
  uint64_t node = 0;
  for (const char byte : word) {
    const auto [at, is_new] = next.emplace(node << 8 | static_cast<unsigned char>(byte),
                                           static_cast<int32_t>(token.size()));
    if (is_new) token.push_back(-1);
    node = static_cast<uint64_t>(at->second);
  }
  begins[static_cast<unsigned char>(word[0])] = true;
  if (token[node] < 0) token[node] = id;
}

int32_t AddedTokens::Trie::longest(std::string_view text, size_t at, size_t& end) const {
  int32_t found = -1;
  uint64_t node = 0;
  for (size_t i = at; i < text.size(); ++i) {
    const auto step = next.find(node << 8 | static_cast<unsigned char>(text[i]));
    if (step == next.end()) break;
    node = static_cast<uint64_t>(step->second);
    if (token[node] >= 0) {
      found = token[node];
      end = i + 1;
    }
  }
  return found;
}

void AddedTokens::find(std::string_view text, const Trie& trie, const Plain& plain,
                       std::vector<Stretch>& out) const {
  out.clear();
  size_t done = 0;
  auto next = plain.begin();
  for (size_t at = 0; at < text.size();) {
    if (next != plain.end() && at >= next->first) {
      at = std::max(at, next->second);
      ++next;
      continue;
    }
    const std::string_view own = text.substr(0, next == plain.end() ? text.npos : next->first);
    size_t end = 0;
    const bool may = trie.begins[static_cast<unsigned char>(text[at])];
    const int32_t id = may ? trie.longest(own, at, end) : -1;
    if (id < 0) {
      ++at;
      continue;
    }
    const Token& token = tokens_.at(id);
    size_t begin = at;
    at = end;
    if (token.single_word && (word_before(text, begin) || word_at(text, end))) continue;
    if (token.left) begin = spaces_before(text, begin);
    if (token.right) end = spaces_after(text, end);
    begin = std::max(begin, done);
    if (begin >= end) continue;  // an earlier token took all of it as the space beside it
    if (done < begin) out.push_back({done, begin, -1});
    out.push_back({begin, end, id});
    done = end;
  }
  if (done < text.size()) out.push_back({done, text.size(), -1});
}

}  // namespace anybit
