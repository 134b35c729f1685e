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

// The text with every piece that is not UTF-8 replaced, as Python's errors="replace" does.
bool is_valid(std::string_view text);
std::string valid(std::string_view text);

}  // namespace anybit::unicode
