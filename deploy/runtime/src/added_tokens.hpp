// The added tokens in tokenizer.json: those that a text may hold as a whole, such as <|im_end|>.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "bpe.hpp"
#include "json.hpp"
#include "normalizer.hpp"

namespace anybit {

// A stretch of a text: of an added token, or with -1 of what lies between.
struct Stretch {
  size_t begin, end;
  int32_t id;
};

class AddedTokens {
 public:
  // Throws Error: a field is damaged, or a token has another id than the vocabulary gives it.
  AddedTokens(const Field& list, const Bpe& model, const Normalizer& normalizer);

  struct Token {
    std::string content;
    bool single_word, left, right, special;  // left, right: takes the space beside it too
  };

  // Stretches of a text as it was given, and as the normalizer left it; other tokens are found in
  // each. None overlap and none is empty.
  // plain: begin and end of stretches, in order, in which no token begins or ends.
  using Plain = std::vector<std::pair<size_t, size_t>>;
  void find_raw(std::string_view text, const Plain& plain, std::vector<Stretch>& out) const {
    find(text, raw_, plain, out);
  }
  void find_normalized(std::string_view text, std::vector<Stretch>& out) const {
    find(text, normalized_, {}, out);
  }

  const std::unordered_map<int32_t, Token>& tokens() const { return tokens_; }

 private:
  // A tree of bytes in which tokens are looked up.
  struct Trie {
    std::unordered_map<uint64_t, int32_t> next;  // node << 8 | byte
    std::vector<int32_t> token = {-1};           // by node; -1: none ends there
    bool begins[256] = {};

    void add(std::string_view word, int32_t id);
    // The longest token at text[at]; its id, or -1, and its end.
    int32_t longest(std::string_view text, size_t at, size_t& end) const;
  };

  void find(std::string_view text, const Trie& trie, const Plain& plain,
            std::vector<Stretch>& out) const;

  std::unordered_map<int32_t, Token> tokens_;
  Trie raw_, normalized_;
};

}  // namespace anybit
