// Text to tokens and back, as a model's tokenizer.json says: byte-level BPE (GPT-2, SmolLM2, LLaMA 3,
// Qwen) and BPE over characters with bytes for what it lacks (LLaMA 1 and 2, Gemma, Mistral).
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#pragma GCC visibility push(default)
namespace anybit {

// Gives the tokens that Hugging Face's tokenizers library gives. Copies share what they hold; every
// function may be called from several threads at once.
class Tokenizer {
 public:
  // Reads tokenizer.json. Its fields for truncation and padding are not followed: a prompt is
  // encoded whole.
  //
  // Throws Error: the file is missing or damaged, or names a normalizer, pre-tokenizer, model,
  // post-processor, decoder or regular expression that is not known here.
  static Tokenizer load(const std::filesystem::path& tokenizer_json);

  // The same of the file's content; `where` stands in messages.
  static Tokenizer parse(std::string_view json, const std::string& where = "tokenizer.json");

  // The tokens of a text. Special tokens in it count as what they are: whoever lets strangers write
  // parts of a prompt decides about them. Each longest piece that is not UTF-8 is read as U+FFFD, as
  // Python's errors="replace" does.
  //
  // add_special: put the tokens before and after that the model wants around a text, such as <s>.
  // A rendered chat template has its own: false there.
  //
  // Throws Error: the file's own regular expression takes too many steps on this text.
  std::vector<int32_t> encode(std::string_view utf8, bool add_special = true) const;

  // The same without tokens of the model's own around it, and with stretches (begin and end in
  // bytes, in order, none empty) in which special tokens and others that are looked up in a text as
  // it was given, such as <|im_end|>, are text like any other: nobody who wrote them there speaks
  // for somebody else.
  //
  // Throws Error: as above; the text is not UTF-8; a stretch spells a special token that this
  // tokenizer looks up in a normalized text.
  std::vector<int32_t> encode(std::string_view utf8,
                              const std::vector<std::pair<size_t, size_t>>& plain) const;

  // The text of tokens; ids that no token has give nothing. Bytes that make no character become
  // U+FFFD. skip_special: leave the special tokens out.
  std::string decode(const std::vector<int32_t>& tokens, bool skip_special = true) const;

  // The text of tokens as they come: see below.
  class Stream;
  Stream stream(bool skip_special = true) const;

  size_t vocab() const;                                     // one more than the largest id
  std::optional<int32_t> id(std::string_view token) const;  // of a token as the file spells it
  std::optional<std::string> token(int32_t id) const;       // the token as the file spells it
  bool is_special(int32_t id) const;

  // The bytes that a token stands for inside a text, which need not be whole characters; a special
  // token's are its name. Those of a text's tokens, joined, are the text, but for a space that some
  // models put before it. "" where no token has the id.
  std::string bytes(int32_t id) const;

 private:
  struct Data;
  explicit Tokenizer(std::shared_ptr<const Data> data) : data_(std::move(data)) {}
  std::shared_ptr<const Data> data_;
};

// Decodes one sequence token by token and never gives a part of a character. What push() and
// finish() gave, joined, is what decode() gives of the same tokens. The one exception is a run of
// byte tokens such as <0xE2> that is not UTF-8: decode() gives a U+FFFD for each byte of the run,
// and this for each byte since the last whole character, which it has given already.
//
// Of one thread at a time; may outlive the tokenizer.
class Tokenizer::Stream {
 public:
  Stream(Stream&&) noexcept;
  Stream& operator=(Stream&&) noexcept;
  ~Stream();

  // The text that is whole by this token; "" while a character is not.
  std::string push(int32_t token);
  // What is left when nothing more comes, such as U+FFFD for half a character; afterwards the stream
  // is as new.
  std::string finish();

 private:
  friend class Tokenizer;
  struct State;
  explicit Stream(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace anybit
#pragma GCC visibility pop
