// UTF-8 by the table of well-formed byte sequences of the Unicode standard (table 3-7), properties of
// characters, and the four normalization forms (Unicode Standard Annex 15).
#include "unicode.hpp"

#include <algorithm>
#include <array>
#include <map>
#include <unordered_map>
#include <vector>

namespace anybit::unicode {

Decoded decode(std::string_view text, size_t at) {
  const auto byte = [&](size_t i) -> unsigned { return static_cast<unsigned char>(text[at + i]); };
  const unsigned first = byte(0);
  if (first < 0x80) return {first, 1, true};
  if (first < 0xc2 || first > 0xf4) return {kReplacement, 1, false};
  const uint32_t length = first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
  // The second byte's range leaves out what is too long, surrogates and what is beyond U+10FFFF.
  const unsigned low = first == 0xe0 ? 0xa0 : first == 0xf0 ? 0x90 : 0x80;
  const unsigned high = first == 0xed ? 0x9f : first == 0xf4 ? 0x8f : 0xbf;
  char32_t code = first & (0x7f >> length);
  for (uint32_t i = 1; i < length; ++i) {
    const bool there = at + i < text.size();
    const unsigned next = there ? byte(i) : 0;
    if (next < (i == 1 ? low : 0x80) || next > (i == 1 ? high : 0xbf)) {
      return {kReplacement, i, false};
    }
    code = code << 6 | (next & 0x3f);
  }
  return {code, length, true};
}

void append(char32_t code, std::string& out) {
  const auto put = [&](char32_t byte) { out += static_cast<char>(byte); };
  if (code < 0x80) {
    put(code);
  } else if (code < 0x800) {
    put(0xc0 | code >> 6);
    put(0x80 | (code & 0x3f));
  } else if (code < 0x10000) {
    put(0xe0 | code >> 12);
    put(0x80 | (code >> 6 & 0x3f));
    put(0x80 | (code & 0x3f));
  } else {
    put(0xf0 | code >> 18);
    put(0x80 | (code >> 12 & 0x3f));
    put(0x80 | (code >> 6 & 0x3f));
    put(0x80 | (code & 0x3f));
  }
}

bool is_valid(std::string_view text) {
  for (size_t at = 0; at < text.size();) {
    const Decoded one = decode(text, at);
    if (!one.valid) return false;
    at += one.bytes;
  }
  return true;
}

std::string valid(std::string_view text) {
  std::string out;
  for (size_t at = 0; at < text.size();) {
    const Decoded one = decode(text, at);
    append(one.code, out);
    at += one.bytes;
  }
  return out;
}

const char* const kCategoryNames[kCategories] = {
    "Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd", "Nl", "No", "Pc", "Pd", "Ps", "Pe",
    "Pi", "Pf", "Po", "Sm", "Sc", "Sk", "So", "Zs", "Zl", "Zp", "Cc", "Cf", "Co", "Cn"};

namespace {

#include "unicode_tables.inc"

constexpr unsigned kWord = 0x20, kNumeric = 0x40, kNotPlain = 0x80;  // beside the category
constexpr char32_t kEnd = 0x110000;

// The tables as they are looked up: made once, at the first use.
struct Tables {
  // A page of 256 characters each; equal pages stand once.
  uint16_t page_of[kEnd >> 8];
  std::vector<std::array<uint8_t, 256>> pages;
  std::unordered_map<char32_t, std::u32string_view> canonical, compatible;
  std::unordered_map<char32_t, uint8_t> classes;
  std::unordered_map<uint64_t, char32_t> pairs;

  Tables() {
    std::map<std::array<uint8_t, 256>, uint16_t> known;
    size_t run = 0;
    for (char32_t page = 0; page < kEnd >> 8; ++page) {
      std::array<uint8_t, 256> bytes;
      for (char32_t i = 0; i < 256; ++i) {
        const char32_t code = page << 8 | i;
        if (run + 1 < std::size(kProperties) && kProperties[run + 1] >> 8 == code) ++run;
        bytes[i] = kProperties[run] & 0xff;
      }
      const auto [at, is_new] = known.emplace(bytes, pages.size());
      if (is_new) pages.push_back(bytes);
      page_of[page] = at->second;
    }
    list(kCanonical, std::size(kCanonical), canonical);
    list(kCompatible, std::size(kCompatible), compatible);
    for (const uint32_t row : kClasses) classes[row >> 8] = row & 0xff;
    for (size_t i = 0; i < std::size(kPairs); i += 3) {
      pairs[uint64_t{kPairs[i]} << 32 | kPairs[i + 1]] = kPairs[i + 2];
    }
  }

  static void list(const uint32_t* rows, size_t count,
                   std::unordered_map<char32_t, std::u32string_view>& table) {
    static_assert(sizeof(char32_t) == sizeof(uint32_t));
    for (size_t i = 0; i < count; i += 1 + (rows[i] & 0xff)) {
      table[rows[i] >> 8] = {reinterpret_cast<const char32_t*>(rows + i + 1), rows[i] & 0xff};
    }
  }

  unsigned properties(char32_t code) const {
    return code < kEnd ? pages[page_of[code >> 8]][code & 0xff] : unsigned{kCn};
  }

  uint8_t class_of(char32_t code) const {
    const auto found = code < 0x300 ? classes.end() : classes.find(code);
    return found == classes.end() ? 0 : found->second;
  }
};

const Tables& tables() {
  static const Tables made;
  return made;
}

// Hangul by arithmetic: chapter 3.12 of the Unicode standard.
constexpr char32_t kS = 0xac00, kL = 0x1100, kV = 0x1161, kT = 0x11a7;
constexpr char32_t kLCount = 19, kVCount = 21, kTCount = 28, kSCount = kLCount * kVCount * kTCount;

void decompose(char32_t code, bool compatible, std::u32string& out) {
  if (code < 0x80) {
    out += code;
    return;
  }
  if (code >= kS && code < kS + kSCount) {
    const char32_t index = code - kS;
    out += kL + index / (kVCount * kTCount);
    out += kV + index / kTCount % kVCount;
    if (index % kTCount != 0) out += kT + index % kTCount;
    return;
  }
  if (compatible) {
    if (const auto found = tables().compatible.find(code); found != tables().compatible.end()) {
      out += found->second;
      return;
    }
  }
  const auto found = tables().canonical.find(code);
  if (found == tables().canonical.end()) {
    out += code;
  } else {
    out += found->second;
  }
}

// Marks between two starters in the order of their classes.
void order(std::u32string& text) {
  for (size_t begin = 0; begin < text.size();) {
    if (tables().class_of(text[begin]) == 0) {
      ++begin;
      continue;
    }
    size_t end = begin;
    while (end < text.size() && tables().class_of(text[end]) != 0) ++end;
    std::stable_sort(text.begin() + begin, text.begin() + end, [](char32_t a, char32_t b) {
      return tables().class_of(a) < tables().class_of(b);
    });
    begin = end;
  }
}

// The composition of two characters; 0: none.
char32_t composed(char32_t a, char32_t b) {
  if (a >= kL && a < kL + kLCount && b >= kV && b < kV + kVCount) {
    return kS + ((a - kL) * kVCount + (b - kV)) * kTCount;
  }
  if (a >= kS && a < kS + kSCount && (a - kS) % kTCount == 0 && b > kT && b < kT + kTCount) {
    return a + (b - kT);
  }
  const auto found = tables().pairs.find(uint64_t{a} << 32 | b);
  return found == tables().pairs.end() ? 0 : found->second;
}

void compose(std::u32string& text) {
  constexpr size_t kNone = ~size_t{0};
  size_t starter = kNone, kept = 0;
  int last = -1;  // class of the mark kept behind the starter; -1: none is
  for (const char32_t code : std::u32string(text)) {
    const int kind = tables().class_of(code);
    if (starter != kNone && last < kind) {
      if (const char32_t whole = composed(text[starter], code)) {
        text[starter] = whole;
        continue;
      }
    }
    text[kept] = code;
    if (kind == 0) {
      starter = kept;
      last = -1;
    } else {
      last = kind;
    }
    ++kept;
  }
  text.resize(kept);
}

void normalize_all(std::string_view text, Form form, std::string& out) {
  std::u32string codes;
  const bool compatible = form == Form::nfkc || form == Form::nfkd;
  for (size_t at = 0; at < text.size(); at += length_of(text[at])) {
    decompose(code_at(text.data() + at), compatible, codes);
  }
  order(codes);
  if (form == Form::nfc || form == Form::nfkc) compose(codes);
  for (const char32_t code : codes) append(code, out);
}

}  // namespace

Category category(char32_t code) { return static_cast<Category>(tables().properties(code) & 0x1f); }

bool is_space(char32_t code) {
  if (code < 0x80) return code == ' ' || (code >= 9 && code <= 13);
  const Category kind = category(code);
  return code == 0x85 || kind == kZs || kind == kZl || kind == kZp;
}

bool is_word(char32_t code) { return tables().properties(code) & kWord; }
bool is_numeric(char32_t code) { return tables().properties(code) & kNumeric; }

std::string normalize(std::string_view text, Form form) {
  std::string out;
  out.reserve(text.size());
  if (form != Form::nfc) {
    normalize_all(text, form, out);
    return out;
  }
  // What is plain stays; the rest is done together with the plain character before it.
  const auto is_plain = [&](size_t at) {
    return static_cast<unsigned char>(text[at]) < 0xcc ||  // below U+0300
           !(tables().properties(code_at(text.data() + at)) & kNotPlain);
  };
  size_t done = 0, before = 0;
  for (size_t at = 0; at < text.size();) {
    if (is_plain(at)) {
      before = at;
      at += length_of(text[at]);
      continue;
    }
    size_t end = at;
    while (end < text.size() && !is_plain(end)) end += length_of(text[end]);
    out += text.substr(done, before - done);
    normalize_all(text.substr(before, end - before), form, out);
    done = before = at = end;
  }
  out += text.substr(done);
  return out;
}

}  // namespace anybit::unicode
