// Reads pre-tokenizers and carries them out.
#include "pre_tokenizer.hpp"

#include <algorithm>

#include "pattern.hpp"
#include "unicode.hpp"

namespace anybit {
namespace {

// GPT-2's rule, which ByteLevel brings along.
constexpr char kGpt2[] =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

enum class Behavior { removed, isolated, merged_with_previous, merged_with_next, contiguous };

Behavior read_behavior(const Field& field) {
  const std::string& name = field.text();
  if (name == "Removed") return Behavior::removed;
  if (name == "Isolated") return Behavior::isolated;
  if (name == "MergedWithPrevious") return Behavior::merged_with_previous;
  if (name == "MergedWithNext") return Behavior::merged_with_next;
  if (name == "Contiguous") return Behavior::contiguous;
  field.refuse("Removed, Isolated, MergedWithPrevious, MergedWithNext or Contiguous");
}

void put(const Piece& piece, size_t begin, size_t end, std::vector<Piece>& out) {
  if (begin < end) {
    out.push_back({piece.text.substr(begin, end - begin), piece.first && begin == 0});
  }
}

// Cuts a piece at its matches, which lie from left to right; all else is what lies between.
void cut(const Piece& piece, const std::vector<Regex::Match>& matches, Behavior behavior,
         bool invert, std::vector<Piece>& out) {
  const size_t size = piece.text.size();
  if (behavior == Behavior::isolated) {  // what lies between stands alone too
    size_t done = 0;
    for (const auto& [begin, end] : matches) {
      put(piece, done, begin, out);
      put(piece, begin, end, out);
      done = end;
    }
    put(piece, done, size, out);
    return;
  }
  struct Part {
    size_t begin, end;
    bool cuts;
  };
  std::vector<Part> parts, joined;
  size_t done = 0;
  for (const auto& [begin, end] : matches) {
    if (done != begin) parts.push_back({done, begin, invert});
    parts.push_back({begin, end, !invert});
    done = end;
  }
  if (done != size) parts.push_back({done, size, invert});
  const bool backwards = behavior == Behavior::merged_with_next;
  if (backwards) std::reverse(parts.begin(), parts.end());
  bool before = false;  // whether the part before cuts
  for (const Part& part : parts) {
    const bool joins = behavior == Behavior::contiguous ? part.cuts == before
                       : behavior == Behavior::removed  ? false
                                                        : part.cuts && !before;
    before = part.cuts;
    if (behavior == Behavior::removed && part.cuts) continue;
    if (!joins || joined.empty()) {
      joined.push_back(part);
    } else if (backwards) {
      joined.back().begin = part.begin;
    } else {
      joined.back().end = part.end;
    }
  }
  if (backwards) std::reverse(joined.begin(), joined.end());
  for (const Part& part : joined) put(piece, part.begin, part.end, out);
}

}  // namespace

class PreTokenizer::Step {
 public:
  virtual ~Step() = default;
  virtual void split(const Piece& piece, Pieces& pieces) const = 0;  // into pieces.list
};

namespace {

class Split : public PreTokenizer::Step {
 public:
  Split(Pattern pattern, Behavior behavior, bool invert)
      : pattern_(std::move(pattern)), behavior_(behavior), invert_(invert) {}

  void split(const Piece& piece, Pieces& pieces) const override {
    pieces.matches.clear();
    pattern_.find_all(piece.text, pieces.matches);
    cut(piece, pieces.matches, behavior_, invert_, pieces.list);
  }

 private:
  Pattern pattern_;
  Behavior behavior_;
  bool invert_;
};

// Cuts at characters of one kind.
class AtCharacters : public PreTokenizer::Step {
 public:
  AtCharacters(bool (*is_one)(char32_t), Behavior behavior)
      : is_one_(is_one), behavior_(behavior) {}

  void split(const Piece& piece, Pieces& pieces) const override {
    const std::string_view text = piece.text;
    pieces.matches.clear();
    for (size_t at = 0; at < text.size();) {
      const size_t end = at + unicode::length_of(text[at]);
      if (is_one_(unicode::code_at(text.data() + at))) pieces.matches.push_back({at, end});
      at = end;
    }
    cut(piece, pieces.matches, behavior_, false, pieces.list);
  }

 private:
  bool (*is_one_)(char32_t);
  Behavior behavior_;
};

// Puts a space before a piece that begins otherwise.
class PrefixSpace : public PreTokenizer::Step {
  void split(const Piece& piece, Pieces& pieces) const override {
    if (piece.text[0] == ' ') {
      pieces.list.push_back(piece);
      return;
    }
    pieces.texts.push_back(" " + std::string(piece.text));
    pieces.list.push_back({pieces.texts.back(), piece.first});
  }
};

class MetaspaceSplit : public PreTokenizer::Step {
 public:
  explicit MetaspaceSplit(const Field& field) : space_(field.at("replacement").text()) {
    if (space_.empty() || space_.size() != unicode::length_of(space_[0])) {
      field.at("replacement").refuse("one character");
    }
    const Field scheme = field.at("prepend_scheme");
    const bool prefix = field.at("add_prefix_space").flag(true);
    const std::string name = prefix ? scheme.text("always") : "never";
    if (name != "always" && name != "first" && name != "never") {
      scheme.refuse("always, first or never");
    }
    always_ = name == "always";
    first_ = name == "first";
    cuts_ = field.at("split").flag(true);
  }

  void split(const Piece& piece, Pieces& pieces) const override {
    std::string text;
    text.reserve(piece.text.size() + space_.size());
    for (const char byte : piece.text) {
      if (byte == ' ') {
        text += space_;
      } else {
        text += byte;
      }
    }
    if ((always_ || (first_ && piece.first)) && text.compare(0, space_.size(), space_) != 0) {
      text.insert(0, space_);
    }
    const Piece whole{pieces.texts.emplace_back(std::move(text)), piece.first};
    if (!cuts_) {
      pieces.list.push_back(whole);
      return;
    }
    pieces.matches.clear();
    for (size_t at = 0; (at = whole.text.find(space_, at)) != whole.text.npos;) {
      pieces.matches.push_back({at, at + space_.size()});
      at += space_.size();
    }
    cut(whole, pieces.matches, Behavior::merged_with_next, false, pieces.list);
  }

 private:
  std::string space_;
  bool always_, first_, cuts_;
};

}  // namespace

PreTokenizer::PreTokenizer(const Field& field) {
  if (!field.is_null()) read(field, 0);
}

PreTokenizer::~PreTokenizer() = default;

void PreTokenizer::read(const Field& field, int depth) {
  const std::string kind = field.at("type").text();
  if (depth > kMostDepth) field.refuse("no more than 16 sequences in each other");
  if (bytes_) field.at("type").refuse("nothing after ByteLevel");
  if (kind == "Sequence") {
    const Field all = field.at("pretokenizers");
    for (size_t i = 0, count = all.items(); i < count; ++i) read(all.at(i), depth + 1);
  } else if (kind == "Split") {
    steps_.push_back(std::make_unique<Split>(Pattern(field.at("pattern")),
                                             read_behavior(field.at("behavior")),
                                             field.at("invert").flag(false)));
  } else if (kind == "ByteLevel") {
    if (field.at("add_prefix_space").flag(true)) steps_.push_back(std::make_unique<PrefixSpace>());
    if (field.at("use_regex").flag(true)) {
      steps_.push_back(
          std::make_unique<Split>(Pattern(kGpt2, field.where()), Behavior::isolated, false));
    }
    bytes_ = true;
  } else if (kind == "Digits") {
    const bool each = field.at("individual_digits").flag(false);
    steps_.push_back(std::make_unique<AtCharacters>(
        unicode::is_numeric, each ? Behavior::isolated : Behavior::contiguous));
  } else if (kind == "Metaspace") {
    steps_.push_back(std::make_unique<MetaspaceSplit>(field));
  } else if (kind == "WhitespaceSplit") {
    steps_.push_back(std::make_unique<AtCharacters>(unicode::is_space, Behavior::removed));
  } else {
    field.at("type").refuse(
        "a pre-tokenizer of Sequence, Split, ByteLevel, Digits, Metaspace, WhitespaceSplit");
  }
}

void PreTokenizer::split(std::string_view text, bool first, Pieces& pieces) const {
  pieces.list.clear();
  pieces.texts.clear();
  if (text.empty()) return;
  pieces.list.push_back({text, first});
  for (const auto& step : steps_) {
    std::swap(pieces.list, pieces.before);
    pieces.list.clear();
    for (const Piece& piece : pieces.before) step->split(piece, pieces);
  }
}

}  // namespace anybit
