// The pre-tokenizer in tokenizer.json: how a text is cut into the words that BPE makes tokens of.
#pragma once

#include <deque>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "json.hpp"
#include "regex.hpp"

namespace anybit {

// A word to be. `first`: the text that somebody gave begins with it.
struct Piece {
  std::string_view text;
  bool first;
};

// Pieces of one text, and what they lie in where it was changed. Of one thread at a time.
struct Pieces {
  std::vector<Piece> list, before;
  std::deque<std::string> texts;
  std::vector<Regex::Match> matches;
};

// Known: Sequence, Split, ByteLevel (as the last), Digits, Metaspace, WhitespaceSplit.
class PreTokenizer {
 public:
  // Throws Error: a field is damaged, or of a kind that is not known here.
  explicit PreTokenizer(const Field& field);
  ~PreTokenizer();

  // Whether it has ByteLevel, so that words are raw bytes.
  bool bytes() const { return bytes_; }

  // Puts the words of a text, which outlives them, into pieces.list. None is empty.
  void split(std::string_view text, bool first, Pieces& pieces) const;

  class Step;

 private:
  void read(const Field& field, int depth);

  std::vector<std::unique_ptr<const Step>> steps_;
  bool bytes_ = false;
};

}  // namespace anybit
