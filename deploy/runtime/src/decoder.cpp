// Reads decoders and carries them out, stage by stage. A stage keeps no more than it must to give the
// right text.
#include "decoder.hpp"

#include <algorithm>

#include "bpe.hpp"
#include "pattern.hpp"
#include "unicode.hpp"

namespace anybit {
namespace {

constexpr int32_t kMostStripped = 1 << 20;
constexpr std::string_view kReplacementText = "\xef\xbf\xbd";  // U+FFFD

class Collect : public Decoder::Stage {
 public:
  explicit Collect(std::string* text) : text_(text) {}
  void take(std::string_view text, bool) override { *text_ += text; }
  void finish() override {}

 private:
  std::string* text_;
};

class SpaceBetween : public Decoder::Stage {
  void take(std::string_view text, bool begins) override {
    if (!first_) give(" ", true);
    first_ = false;
    give(text, begins);
  }
  void finish() override {
    first_ = true;
    Stage::finish();
  }
  bool first_ = true;
};

class Replace : public Decoder::Stage {
 public:
  Replace(std::shared_ptr<const Pattern> pattern, std::string content)
      : pattern_(std::move(pattern)), content_(std::move(content)) {}
  void take(std::string_view text, bool begins) override {
    give(pattern_->replaced(text, content_), begins);
  }

 private:
  std::shared_ptr<const Pattern> pattern_;
  std::string content_;
};

class Fuse : public Decoder::Stage {
  void take(std::string_view text, bool) override {
    give(text, first_);
    first_ = false;
  }
  void finish() override {
    first_ = true;
    Stage::finish();
  }
  bool first_ = true;
};

// The number of a token such as <0xE2>; -1: it is none.
int byte_of_token(std::string_view token) {
  if (token.size() != 6 || token.substr(0, 3) != "<0x" || token[5] != '>') return -1;
  const auto digit = [](char c) {
    return c >= '0' && c <= '9'   ? c - '0'
           : c >= 'a' && c <= 'f' ? c - 'a' + 10
           : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                  : -1;
  };
  const int high = token[3] == '+' ? 0 : digit(token[3]), low = digit(token[4]);
  return high < 0 || low < 0 ? -1 : high << 4 | low;
}

class ByteFallback : public Decoder::Stage {
 public:
  explicit ByteFallback(Decoder::Bytes bytes) : bytes_(bytes) {}

  void take(std::string_view token, bool begins) override {
    const int byte = byte_of_token(token);
    if (byte < 0) {
      flush();
      give(token, begins);
      return;
    }
    run_ += static_cast<char>(byte);
    if (bytes_ == Decoder::Bytes::raw) return flush();
    if (bytes_ == Decoder::Bytes::mended) return;
    if (const unicode::Decoded one = unicode::decode(run_, 0); one.valid) flush();
  }

  void finish() override {
    flush();
    Stage::finish();
  }

 private:
  void flush() {
    if (run_.empty()) return;
    if (bytes_ == Decoder::Bytes::raw || unicode::is_valid(run_)) {
      give(run_, true);
    } else {
      for (size_t i = 0; i < run_.size(); ++i) give(kReplacementText, true);
    }
    run_.clear();
  }

  Decoder::Bytes bytes_;
  std::string run_;
};

class ByteLevel : public Decoder::Stage {
 public:
  explicit ByteLevel(bool raw) : raw_(raw) {}

  void take(std::string_view token, bool) override {
    const size_t before = bytes_.size();
    for (size_t at = 0; at < token.size(); at += unicode::length_of(token[at])) {
      if (const auto byte = byte_of(unicode::code_at(token.data() + at))) {
        bytes_ += static_cast<char>(*byte);
      } else {  // a token in letters of its own, such as an added one
        bytes_.resize(before);
        bytes_ += token;
        break;
      }
    }
    give_whole(false);
  }

  void finish() override {
    give_whole(true);
    first_ = true;
    Stage::finish();
  }

 private:
  void give_whole(bool last) {
    std::string out;
    size_t at = 0;
    if (raw_) out.swap(bytes_);
    while (at < bytes_.size()) {
      const unicode::Decoded one = unicode::decode(bytes_, at);
      const auto lead = static_cast<unsigned char>(bytes_[at]);
      const bool may_go_on = at + one.bytes == bytes_.size() && lead >= 0xc2 && lead <= 0xf4;
      if (!one.valid && may_go_on && !last) break;
      unicode::append(one.code, out);
      at += one.bytes;
    }
    bytes_.erase(0, at);
    if (out.empty()) return;
    give(out, first_);
    first_ = false;
  }

  bool raw_, first_ = true;
  std::string bytes_;
};

class Metaspace : public Decoder::Stage {
 public:
  Metaspace(std::string space, bool drops) : space_(std::move(space)), drops_(drops) {}

  void take(std::string_view text, bool begins) override {
    tokens_ += begins;
    std::string out;
    for (size_t at = 0; at < text.size();) {
      const std::string_view one = text.substr(at, unicode::length_of(text[at]));
      at += one.size();
      if (one != space_) {
        out += one;
      } else if (tokens_ > 1 || !drops_) {
        out += ' ';
      }
    }
    give(out, begins);
  }

  void finish() override {
    tokens_ = 0;
    Stage::finish();
  }

 private:
  std::string space_;
  bool drops_;  // spaces of the first token
  size_t tokens_ = 0;
};

class Strip : public Decoder::Stage {
 public:
  Strip(std::string content, int32_t left, int32_t right)
      : content_(std::move(content)), left_(left), right_(right) {}

  void take(std::string_view text, bool begins) override {
    if (begins) {
      to_drop_ = left_;
      held_ = 0;
    }
    std::string out;
    for (size_t at = 0; at < text.size();) {
      const std::string_view one = text.substr(at, unicode::length_of(text[at]));
      at += one.size();
      if (one != content_) {
        for (; held_ > 0; --held_) out += content_;
        to_drop_ = 0;
        out += one;
      } else if (to_drop_ > 0) {
        --to_drop_;
      } else if (held_ < right_) {
        ++held_;  // it may be among the token's last
      } else {
        out += content_;
      }
    }
    give(out, begins);
  }

  void finish() override {
    held_ = 0;
    Stage::finish();
  }

 private:
  std::string content_;
  int32_t left_, right_, to_drop_ = 0, held_ = 0;
};

std::string character(const Field& field) {
  const std::string text = field.text();
  if (text.empty() || text.size() != unicode::length_of(text[0])) field.refuse("one character");
  return text;
}

}  // namespace

Decoder::Decoder(const Field& field) {
  if (field.is_null()) {
    makers_.push_back([](Bytes) { return std::make_unique<SpaceBetween>(); });
  } else {
    read(field, 0);
  }
}

void Decoder::read(const Field& field, int depth) {
  const std::string kind = field.at("type").text();
  if (depth > kMostDepth) field.refuse("no more than 16 sequences in each other");
  const auto whole_tokens = [&] {
    if (fused_) field.at("type").refuse("it before tokens are joined by Fuse or ByteLevel");
  };
  if (kind == "Sequence") {
    const Field all = field.at("decoders");
    for (size_t i = 0, count = all.items(); i < count; ++i) read(all.at(i), depth + 1);
  } else if (kind == "ByteLevel") {
    whole_tokens();
    fused_ = true;
    makers_.push_back([](Bytes bytes) { return std::make_unique<ByteLevel>(bytes == Bytes::raw); });
  } else if (kind == "Fuse") {
    fused_ = true;
    makers_.push_back([](Bytes) { return std::make_unique<Fuse>(); });
  } else if (kind == "ByteFallback") {
    whole_tokens();
    makers_.push_back([](Bytes bytes) { return std::make_unique<ByteFallback>(bytes); });
  } else if (kind == "Metaspace") {
    const bool prefix = field.at("add_prefix_space").flag(true);
    const bool drops = prefix && field.at("prepend_scheme").text("always") != "never";
    makers_.push_back([space = character(field.at("replacement")), drops](Bytes) {
      return std::make_unique<Metaspace>(space, drops);
    });
  } else if (kind == "Replace") {
    const auto pattern = std::make_shared<const Pattern>(field.at("pattern"));
    if (!pattern->is_character()) whole_tokens();
    makers_.push_back([pattern, content = field.at("content").text()](Bytes) {
      return std::make_unique<Replace>(pattern, content);
    });
  } else if (kind == "Strip") {
    const int32_t left = field.at("start").number(kMostStripped);
    const int32_t right = field.at("stop").number(kMostStripped);
    makers_.push_back([content = character(field.at("content")), left, right](Bytes) {
      return std::make_unique<Strip>(content, left, right);
    });
  } else {
    field.at("type").refuse(
        "a decoder of Sequence, ByteLevel, Metaspace, Replace, ByteFallback, Fuse, Strip");
  }
}

Decoder::Way Decoder::way(Bytes bytes) const {
  Way way;
  way.text_ = std::make_unique<std::string>();
  for (const Maker& make : makers_) way.stages_.push_back(make(bytes));
  way.stages_.push_back(std::make_unique<Collect>(way.text_.get()));
  for (size_t i = 0; i + 1 < way.stages_.size(); ++i) {
    way.stages_[i]->next_ = way.stages_[i + 1].get();
  }
  return way;
}

}  // namespace anybit
