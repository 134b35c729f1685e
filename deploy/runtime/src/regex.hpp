// The regular expressions of tokenizers: what the patterns of byte-level BPE use, matched by
// backtracking as Oniguruma does.
//
// Known: literals, . [..] [^..] with ranges, \s \S \d \D \p{Lu} \p{L} \P{..} \p{^..} \r \n \t \xHH
// \x{..} \uHHHH, groups (?:..) (..), (?i:..) over ASCII letters, |, the quantifiers ? * + {m} {m,n}
// {m,} and the possessive ?+ *+ ++, lookahead (?=..) (?!..). All else is an Error when it is
// compiled.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "unicode.hpp"

namespace anybit {

// A set of characters.
class CharSet {
 public:
  void add(char32_t first, char32_t last);
  void add_category(unicode::Category category);
  void add(const CharSet& other);
  void invert() { negated_ = !negated_; }
  void finish();  // after the last change, before the first has()

  bool has(char32_t code) const { return code < 128 ? ascii_[code] : slow(code); }
  bool has_ascii(unsigned char byte) const { return ascii_[byte]; }

 private:
  bool slow(char32_t code) const;

  std::array<bool, 128> ascii_{};
  uint32_t categories_ = 0;
  std::vector<std::pair<char32_t, char32_t>> ranges_;
  std::vector<CharSet> others_;  // negated ones, which a union cannot take apart
  bool negated_ = false;
};

class Regex {
 public:
  // Throws Error: the pattern has something that is not known here; `where` stands in it.
  Regex(const std::string& pattern, const std::string& where);

  using Match = std::pair<size_t, size_t>;  // begin and end

  // Puts every match in text that is UTF-8 into `found`, from left to right. After an empty match
  // the search goes on one character later, and one right behind a match does not count.
  //
  // Throws Error: it takes more than 2000 steps for each byte of the text.
  void find_all(std::string_view text, std::vector<Match>& found) const;

 private:
  friend class RegexParser;
  enum class Op : uint8_t { set, loop, split, jump, look, mark, moved, match };
  struct Step {
    Op op;
    bool flag = false;      // loop: possessive; look: negative
    uint32_t a = 0, b = 0;  // set, loop: which set. split: first and second way. jump: where to.
                            // look: end of its body. mark, moved: which register, and where to go
                            // on if nothing was taken since
    uint32_t min = 0, max = 0;  // loop
  };
  // A way that is left to try.
  struct Back {
    uint32_t step;
    size_t at, least;  // least < at: a loop may give back characters down to there
  };

  struct Search;
  bool match(Search& search, uint32_t step, size_t at, size_t& end) const;

  std::string pattern_, where_;
  std::vector<CharSet> sets_;
  std::vector<Step> steps_;
  uint32_t marks_ = 0;
  // Where each alternative begins; by an ASCII character, which of the first 64 it may begin.
  std::vector<uint32_t> ways_;
  std::array<uint64_t, 128> may_begin_{};
};

}  // namespace anybit
