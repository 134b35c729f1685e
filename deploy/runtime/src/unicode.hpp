// UTF-8, and what the Unicode standard says of characters, as the regular expressions and
// normalizers of tokenizers need it. The tables are made by deploy/runtime/unicode_tables.py.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace anybit::unicode {

constexpr char32_t kReplacement = 0xfffd;

struct Decoded {
  char32_t code;   // kReplacement where the bytes are not UTF-8
  uint32_t bytes;  // 1 to 4: of the character, or of the longest piece that begins like one
  bool valid;
};

// The character that begins at text[at]; at < text.size().
Decoded decode(std::string_view text, size_t at);

void append(char32_t code, std::string& out);

// Whether text is UTF-8; the text with every piece that is not replaced, as Python's
// errors="replace" does.
bool is_valid(std::string_view text);
std::string valid(std::string_view text);

// Bytes of the character that begins with this byte of text that is UTF-8.
inline uint32_t length_of(unsigned char first) {
  return first < 0x80 ? 1 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
}

// The character at p of text that is UTF-8.
inline char32_t code_at(const char* p) {
  const auto* byte = reinterpret_cast<const unsigned char*>(p);
  if (byte[0] < 0x80) return byte[0];
  if (byte[0] < 0xe0) return (byte[0] & 0x1fu) << 6 | (byte[1] & 0x3fu);
  if (byte[0] < 0xf0) {
    return (byte[0] & 0x0fu) << 12 | (byte[1] & 0x3fu) << 6 | (byte[2] & 0x3fu);
  }
  return (byte[0] & 0x07u) << 18 | (byte[1] & 0x3fu) << 12 | (byte[2] & 0x3fu) << 6 |
         (byte[3] & 0x3fu);
}

inline bool is_continuation(char byte) { return (static_cast<unsigned char>(byte) & 0xc0) == 0x80; }

// General categories, in the order of unicode_tables.py.
enum Category : uint8_t {
  kLu,
  kLl,
  kLt,
  kLm,
  kLo,
  kMn,
  kMc,
  kMe,
  kNd,
  kNl,
  kNo,
  kPc,
  kPd,
  kPs,
  kPe,
  kPi,
  kPf,
  kPo,
  kSm,
  kSc,
  kSk,
  kSo,
  kZs,
  kZl,
  kZp,
  kCc,
  kCf,
  kCo,
  kCn
};
constexpr int kCategories = kCn + 1;
extern const char* const kCategoryNames[kCategories];  // "Lu" ...

Category category(char32_t code);
bool is_space(char32_t code);    // White_Space
bool is_word(char32_t code);     // \w of Rust's regular expressions
bool is_numeric(char32_t code);  // Rust's char::is_numeric

enum class Form { nfc, nfd, nfkc, nfkd };

// `text` is UTF-8.
std::string normalize(std::string_view text, Form form);

}  // namespace anybit::unicode
