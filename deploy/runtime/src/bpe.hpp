// Byte-pair encoding: the model in tokenizer.json that makes tokens of a word.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "json.hpp"

namespace anybit {

// Tokens of a word by the order of its merges. Not changed once it is made.
class Bpe {
 public:
  // bytes: words come as raw bytes, which the vocabulary spells in the letters of byte-level BPE.
  //
  // Throws Error: a field is damaged, or asks for something that is not known here.
  Bpe(const Field& model, bool bytes);

  // What encoding needs besides: results of earlier words, room to work. Of one thread at a time.
  class Scratch;

  // Puts the tokens of a word behind `out`.
  void encode(std::string_view word, Scratch& scratch, std::vector<int32_t>& out) const;

  std::optional<int32_t> id(std::string_view token) const;
  const std::string* token(int32_t id) const;                           // null: no token has it
  size_t size() const { return ids_.size(); }                           // of the vocabulary
  int32_t end() const { return static_cast<int32_t>(tokens_.size()); }  // the largest id and one

  // Whether a word may be cut before every space symbol that follows something else: no token goes
  // across such a place.
  bool cuts_before(std::string_view space) const;

 private:
  struct Merge {
    uint64_t pair;  // left << 32 | right
    int32_t rank, made;
  };
  static constexpr uint64_t kNoPair = ~uint64_t{0};

  void read_vocabulary(const Field& vocab);
  void read_merges(const Field& merges);
  void place_merges(const std::vector<Merge>& merges);
  const Merge* merge(int32_t left, int32_t right) const;
  void first_symbols(std::string_view word, std::vector<int32_t>& symbols) const;
  void merge_few(std::vector<int32_t>& symbols) const;
  void merge_many(Scratch& scratch) const;

  bool bytes_, byte_fallback_, fuse_unk_, ignore_merges_;
  std::string prefix_, suffix_;  // of a word's later pieces; of its last
  std::optional<int32_t> unk_;
  std::unordered_map<std::string_view, int32_t> ids_;  // of tokens_
  std::vector<std::optional<std::string>> tokens_;
  std::unordered_map<std::string, int32_t> words_;  // raw bytes of tokens, with ignore_merges
  std::array<int32_t, 256> byte_ids_;  // of a byte's letter with `bytes`, else of <0x..>; -1: none
  bool all_bytes_ = true;
  std::vector<std::pair<int32_t, int32_t>> merged_;  // pairs of ids
  std::vector<Merge> merges_;                        // open addressing
};

class Bpe::Scratch {
 public:
  Scratch() : slots_(kSlots) {}

 private:
  friend class Bpe;
  // One line of the processor's cache.
  struct Slot {
    static constexpr size_t kBytes = 30, kTokens = 8;
    uint8_t bytes = 0, tokens = 0;  // 0 tokens: empty
    char word[kBytes];
    int32_t ids[kTokens];
  };
  struct Symbol {
    int32_t id, before, after;  // positions; -1: none
  };
  struct Candidate {
    int32_t rank, at, made;
  };
  static constexpr size_t kSlots = 1 << 14;  // 1 MiB; a later word takes an earlier one's place

  std::vector<Slot> slots_;
  std::vector<int32_t> symbols_;
  std::vector<Symbol> list_;
  std::vector<Candidate> heap_;
};

// The letters by which byte-level BPE spells bytes, and back.
char32_t letter_of(uint8_t byte);
std::optional<uint8_t> byte_of(char32_t letter);

}  // namespace anybit
