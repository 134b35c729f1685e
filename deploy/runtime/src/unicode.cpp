// UTF-8 by the table of well-formed byte sequences of the Unicode standard (table 3-7).
#include "unicode.hpp"

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

}  // namespace anybit::unicode
