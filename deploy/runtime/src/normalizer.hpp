// The normalizer in tokenizer.json: what is done to a text before it is split.
#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "json.hpp"

namespace anybit {

// Known: Sequence, Prepend, Replace, NFC, NFD, NFKC, NFKD, Strip.
class Normalizer {
 public:
  // Throws Error: a field is damaged, or of a kind that is not known here.
  explicit Normalizer(const Field& field);

  bool is_none() const { return steps_.empty(); }
  std::string apply(std::string_view text) const;

 private:
  void read(const Field& field, int depth);

  std::vector<std::function<std::string(std::string)>> steps_;
};

}  // namespace anybit
