// Words to tokens. A short word is merged in place, pair by pair; a long one with a heap of candidates
// over a linked list, so that time grows as n log n.
#include "bpe.hpp"

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>

#include "unicode.hpp"

namespace anybit {
namespace {

constexpr size_t kFew = 48;  // symbols: up to here looking at all pairs beats the heap

uint64_t mixed(uint64_t value) {  // the finalizer of SplitMix64
  value = (value ^ value >> 30) * 0xbf58476d1ce4e5b9;
  value = (value ^ value >> 27) * 0x94d049bb133111eb;
  return value ^ value >> 31;
}

uint64_t hash_of(std::string_view word) {
  uint64_t hash = word.size();
  size_t at = 0;
  for (; at + 8 <= word.size(); at += 8) {
    uint64_t part;
    std::memcpy(&part, word.data() + at, 8);
    hash = mixed(hash ^ part);
  }
  uint64_t part = 0;
  std::memcpy(&part, word.data() + at, word.size() - at);
  return mixed(hash ^ part);
}

// The printable letters of Latin-1 stand for themselves, the rest for U+0100 on, as in GPT-2.
struct Letters {
  std::array<char32_t, 256> of;
  std::array<int16_t, 0x144> back;
  Letters() {
    back.fill(-1);
    char32_t next = 0x100;
    for (unsigned byte = 0; byte < 256; ++byte) {
      const bool itself = (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte != 0xad);
      of[byte] = itself ? byte : next++;
      back[of[byte]] = static_cast<int16_t>(byte);
    }
  }
};

const Letters& letters() {
  static const Letters made;
  return made;
}

std::optional<std::string> raw_bytes(std::string_view token) {
  std::string raw;
  for (size_t at = 0; at < token.size(); at += unicode::length_of(token[at])) {
    const std::optional<uint8_t> byte = byte_of(unicode::code_at(token.data() + at));
    if (!byte) return std::nullopt;
    raw += static_cast<char>(*byte);
  }
  return raw;
}

std::string byte_token(unsigned byte) {
  constexpr char kHex[] = "0123456789ABCDEF";
  return {'<', '0', 'x', kHex[byte >> 4], kHex[byte & 15], '>'};
}

}  // namespace

char32_t letter_of(uint8_t byte) { return letters().of[byte]; }

std::optional<uint8_t> byte_of(char32_t letter) {
  if (letter >= letters().back.size() || letters().back[letter] < 0) return std::nullopt;
  return static_cast<uint8_t>(letters().back[letter]);
}

Bpe::Bpe(const Field& model, bool bytes) : bytes_(bytes) {
  if (model.at("type").text("BPE") != "BPE") model.at("type").refuse("BPE, as LLaMA's and Qwen's");
  const Field dropout = model.at("dropout");
  if (!dropout.is_null() && dropout.value() != 0) dropout.refuse("null: nothing is left to chance");
  byte_fallback_ = model.at("byte_fallback").flag(false);
  fuse_unk_ = model.at("fuse_unk").flag(false);
  ignore_merges_ = model.at("ignore_merges").flag(false);
  prefix_ = model.at("continuing_subword_prefix").text("");
  suffix_ = model.at("end_of_word_suffix").text("");
  if (bytes && prefix_ + suffix_ != "") {
    model.refuse("no continuing_subword_prefix or end_of_word_suffix in byte-level BPE");
  }
  read_vocabulary(model.at("vocab"));
  if (const Field unk = model.at("unk_token"); !unk.is_null()) {
    unk_ = id(unk.text());
    if (!unk_) unk.refuse("a token of the vocabulary");
  }
  for (unsigned byte = 0; byte < 256; ++byte) {
    std::string spelled = byte_token(byte);
    if (bytes) {
      spelled.clear();
      unicode::append(letter_of(byte), spelled);
    }
    byte_ids_[byte] = id(spelled).value_or(-1);
    all_bytes_ &= byte_ids_[byte] >= 0;
  }
  read_merges(model.at("merges"));
  if (!ignore_merges_) return;
  for (const auto& [token, id] : ids_) {
    if (!bytes) {
      words_.emplace(token, id);
    } else if (std::optional<std::string> raw = raw_bytes(token)) {
      words_.emplace(std::move(*raw), id);
    }
  }
}

void Bpe::read_vocabulary(const Field& vocab) {
  if (!vocab.value().is_object()) vocab.refuse("an object of tokens and their ids");
  int32_t most = -1;
  for (const auto& [token, id] : vocab.value().items()) {
    const bool fits = id.is_number_unsigned() && id.get<uint64_t>() < kMostIds;
    if (!fits) vocab.at(token).refuse("a whole number from 0 to " + std::to_string(kMostIds - 1));
    most = std::max(most, id.get<int32_t>());
  }
  tokens_.resize(most + 1);
  ids_.reserve(vocab.value().size());
  for (const auto& [token, id] : vocab.value().items()) {
    std::optional<std::string>& place = tokens_[id.get<int32_t>()];
    if (place) vocab.at(token).refuse("an id that no other token has");
    place = token;
    ids_.emplace(*place, id.get<int32_t>());
  }
}

void Bpe::read_merges(const Field& merges) {
  const size_t count = merges.items();
  std::vector<Merge> made;
  made.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const nlohmann::json& one = merges.value()[i];
    std::string_view left, right;
    if (one.is_string()) {
      const std::string_view text = one.get_ref<const std::string&>();
      const size_t space = text.find(' ');
      if (space == text.npos || text.find(' ', space + 1) != text.npos) {
        merges.at(i).refuse("two tokens with a space between");
      }
      left = text.substr(0, space);
      right = text.substr(space + 1);
    } else {
      const bool pair =
          one.is_array() && one.size() == 2 && one[0].is_string() && one[1].is_string();
      if (!pair) merges.at(i).refuse("two tokens");
      left = one[0].get_ref<const std::string&>();
      right = one[1].get_ref<const std::string&>();
    }
    const bool has_prefix = right.substr(0, prefix_.size()) == prefix_;
    std::string whole(left);
    if (has_prefix) whole += right.substr(prefix_.size());
    const auto a = id(left), b = id(right), c = has_prefix ? id(whole) : std::nullopt;
    if (!a || !b || !c) {
      throw Error(merges.at(i).where(),
                  "got " + printable(std::string(left)) + " and " + printable(std::string(right)) +
                      ", expected tokens of the vocabulary that make a third",
                  merges.fix());
    }
    made.push_back({uint64_t(*a) << 32 | uint32_t(*b), static_cast<int32_t>(i), *c});
    merged_.push_back({*a, *b});
  }
  place_merges(made);
}

void Bpe::place_merges(const std::vector<Merge>& merges) {
  size_t slots = 16;
  while (slots < 2 * merges.size()) slots *= 2;
  merges_.assign(slots, {kNoPair, 0, 0});
  for (const Merge& merge : merges) {
    size_t at = mixed(merge.pair) & (slots - 1);
    while (merges_[at].pair != kNoPair && merges_[at].pair != merge.pair) {
      at = (at + 1) & (slots - 1);
    }
    merges_[at] = merge;  // of a pair that stands twice the later one counts
  }
}

const Bpe::Merge* Bpe::merge(int32_t left, int32_t right) const {
  const uint64_t pair = uint64_t(uint32_t(left)) << 32 | uint32_t(right);
  for (size_t at = mixed(pair);; ++at) {
    const Merge& found = merges_[at & (merges_.size() - 1)];
    if (found.pair == pair) return &found;
    if (found.pair == kNoPair) return nullptr;
  }
}

std::optional<int32_t> Bpe::id(std::string_view token) const {
  const auto found = ids_.find(token);
  if (found == ids_.end()) return std::nullopt;
  return found->second;
}

const std::string* Bpe::token(int32_t id) const {
  if (id < 0 || id >= end() || !tokens_[id]) return nullptr;
  return &*tokens_[id];
}

bool Bpe::cuts_before(std::string_view space) const {
  // Bytes that stand for lacking characters must not meet "unknown" of the next piece, nor a space
  // that is itself lacking.
  if (bytes_ || ignore_merges_ || !byte_fallback_ || !all_bytes_ || prefix_ + suffix_ != "" ||
      !id(space)) {
    return false;
  }
  const auto begins = [&](const std::string& token) {
    return token.compare(0, space.size(), space) == 0;
  };
  const auto ends = [&](const std::string& token) {
    return token.size() >= space.size() &&
           token.compare(token.size() - space.size(), space.size(), space) == 0;
  };
  return std::none_of(merged_.begin(), merged_.end(), [&](const std::pair<int32_t, int32_t>& one) {
    return begins(*tokens_[one.second]) && !ends(*tokens_[one.first]);
  });
}

void Bpe::encode(std::string_view word, Scratch& scratch, std::vector<int32_t>& out) const {
  if (word.empty()) return;
  Scratch::Slot* slot = nullptr;
  if (word.size() <= Scratch::Slot::kBytes) {
    slot = &scratch.slots_[hash_of(word) & (Scratch::kSlots - 1)];
    if (slot->tokens != 0 && slot->bytes == word.size() &&
        std::memcmp(slot->word, word.data(), word.size()) == 0) {
      out.insert(out.end(), slot->ids, slot->ids + slot->tokens);
      return;
    }
  }
  std::vector<int32_t>& symbols = scratch.symbols_;
  symbols.clear();
  const auto whole = ignore_merges_ ? words_.find(std::string(word)) : words_.end();
  if (whole != words_.end()) {
    symbols.push_back(whole->second);
  } else {
    first_symbols(word, symbols);
    if (symbols.size() <= kFew) {
      merge_few(symbols);
    } else {
      merge_many(scratch);
    }
  }
  out.insert(out.end(), symbols.begin(), symbols.end());
  if (slot == nullptr || symbols.empty() || symbols.size() > Scratch::Slot::kTokens) return;
  slot->bytes = static_cast<uint8_t>(word.size());
  slot->tokens = static_cast<uint8_t>(symbols.size());
  std::memcpy(slot->word, word.data(), word.size());
  std::copy(symbols.begin(), symbols.end(), slot->ids);
}

void Bpe::first_symbols(std::string_view word, std::vector<int32_t>& symbols) const {
  if (bytes_ && all_bytes_) {
    for (const char byte : word) symbols.push_back(byte_ids_[static_cast<unsigned char>(byte)]);
    return;
  }
  std::optional<int32_t> unknown;  // waits for its neighbours where unknown ones are fused
  const auto known = [&](int32_t id) {
    if (unknown) symbols.push_back(*unknown);
    unknown.reset();
    symbols.push_back(id);
  };
  const auto lacks = [&] {
    if (!unk_) return;
    if (unknown && !fuse_unk_) symbols.push_back(*unknown);
    unknown = unk_;
  };
  std::string spelled;
  for (size_t at = 0; at < word.size();) {
    if (bytes_) {
      const int32_t id = byte_ids_[static_cast<unsigned char>(word[at++])];
      id < 0 ? lacks() : known(id);
      continue;
    }
    const std::string_view letter = word.substr(at, unicode::length_of(word[at]));
    spelled.assign(at == 0 ? "" : prefix_).append(letter);
    at += letter.size();
    if (at == word.size()) spelled += suffix_;
    if (const std::optional<int32_t> found = id(spelled)) {
      known(*found);
      continue;
    }
    const auto byte_id = [&](char byte) { return byte_ids_[static_cast<unsigned char>(byte)]; };
    const bool falls_back =
        byte_fallback_ &&
        std::all_of(spelled.begin(), spelled.end(), [&](char byte) { return byte_id(byte) >= 0; });
    if (!falls_back) {
      lacks();
      continue;
    }
    for (const char byte : spelled) symbols.push_back(byte_id(byte));
  }
  if (unknown) symbols.push_back(*unknown);
}

void Bpe::merge_few(std::vector<int32_t>& symbols) const {
  // The merge of each symbol with the next one; the leftmost of the best goes first.
  const Merge* next[kFew];
  size_t count = symbols.size();
  for (size_t i = 0; i + 1 < count; ++i) next[i] = merge(symbols[i], symbols[i + 1]);
  while (count > 1) {
    size_t best = count;
    for (size_t i = 0; i + 1 < count; ++i) {
      if (next[i] && (best == count || next[i]->rank < next[best]->rank)) best = i;
    }
    if (best == count) break;
    symbols[best] = next[best]->made;
    std::copy(symbols.begin() + best + 2, symbols.begin() + count, symbols.begin() + best + 1);
    if (best + 2 < count) std::copy(next + best + 2, next + count - 1, next + best + 1);
    --count;
    if (best > 0) next[best - 1] = merge(symbols[best - 1], symbols[best]);
    if (best + 1 < count) next[best] = merge(symbols[best], symbols[best + 1]);
  }
  symbols.resize(count);
}

void Bpe::merge_many(Scratch& scratch) const {
  std::vector<Scratch::Symbol>& list = scratch.list_;
  std::vector<Scratch::Candidate>& heap = scratch.heap_;
  const auto worse = [](const Scratch::Candidate& a, const Scratch::Candidate& b) {
    return a.rank != b.rank ? a.rank > b.rank : a.at > b.at;
  };
  list.clear();
  heap.clear();
  const auto count = static_cast<int32_t>(scratch.symbols_.size());
  for (int32_t i = 0; i < count; ++i) {
    list.push_back({scratch.symbols_[i], i - 1, i + 1 < count ? i + 1 : -1});
  }
  const auto candidate = [&](int32_t at) -> std::optional<Scratch::Candidate> {
    if (at < 0 || list[at].after < 0) return std::nullopt;
    const Merge* found = merge(list[at].id, list[list[at].after].id);
    if (!found) return std::nullopt;
    return Scratch::Candidate{found->rank, at, found->made};
  };
  const auto push = [&](int32_t at) {
    if (const auto one = candidate(at)) {
      heap.push_back(*one);
      std::push_heap(heap.begin(), heap.end(), worse);
    }
  };
  for (int32_t i = 0; i < count; ++i) {
    if (const auto one = candidate(i)) heap.push_back(*one);
  }
  std::make_heap(heap.begin(), heap.end(), worse);
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), worse);
    const Scratch::Candidate best = heap.back();
    heap.pop_back();
    Scratch::Symbol& left = list[best.at];
    // One whose symbols have been merged otherwise since is stale.
    const auto now = left.id < 0 ? std::nullopt : candidate(best.at);
    if (!now || now->made != best.made) continue;
    Scratch::Symbol& right = list[left.after];
    left.id = best.made;
    left.after = right.after;
    right.id = -1;
    if (left.after >= 0) list[left.after].before = best.at;
    push(left.before);
    push(best.at);
  }
  scratch.symbols_.clear();
  for (int32_t at = 0; at >= 0; at = list[at].after) scratch.symbols_.push_back(list[at].id);
}

}  // namespace anybit
