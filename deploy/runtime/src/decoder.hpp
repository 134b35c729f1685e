// The decoder in tokenizer.json: how tokens become a text, whole or as they come.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "json.hpp"

namespace anybit {

// Known: Sequence, ByteLevel, Metaspace, Replace, ByteFallback, Fuse, Strip; or none, which puts a
// space between tokens.
class Decoder {
 public:
  // A part of the way from tokens to text.
  class Stage {
   public:
    virtual ~Stage() = default;
    // Takes a token, or with begins = false more of the token before.
    virtual void take(std::string_view text, bool begins) = 0;
    virtual void finish() { next_->finish(); }  // nothing more comes

   protected:
    friend class Decoder;
    void give(std::string_view text, bool begins) { next_->take(text, begins); }
    Stage* next_ = nullptr;
  };

  // One sequence of tokens on its way: text[] takes what comes out.
  class Way {
   public:
    void take(std::string_view token) { stages_.front()->take(token, true); }
    void finish() { stages_.front()->finish(); }
    std::string& text() { return *text_; }

   private:
    friend class Decoder;
    std::vector<std::unique_ptr<Stage>> stages_;
    std::unique_ptr<std::string> text_;
  };

  // Throws Error: a field is damaged, or of a kind or in an order that is not known here.
  explicit Decoder(const Field& field);

  // What becomes of bytes that are no whole character.
  enum class Bytes {
    mended,  // they become U+FFFD when all of the text is known
    early,   // the same, but every character is given as soon as it is whole
    raw      // they are given as they are
  };
  Way way(Bytes bytes) const;

 private:
  using Maker = std::function<std::unique_ptr<Stage>(Bytes bytes)>;
  void read(const Field& field, int depth);

  std::vector<Maker> makers_;
  bool fused_ = false;  // what comes now comes in parts
};

}  // namespace anybit
