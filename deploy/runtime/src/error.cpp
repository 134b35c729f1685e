// Makes the three parts of an error fit to be shown.
#include "anybit/error.hpp"

#include <array>
#include <cstdint>

#include "unicode.hpp"

namespace anybit {
namespace {

constexpr size_t kLongest = 1500;  // bytes of a part

// What a terminal obeys or what disarranges a line; plugins/text.py has the same list.
bool is_control(char32_t c) {
  return c < 0x20 || (c >= 0x7f && c < 0xa0) || c == 0x61c || c == 0x200e || c == 0x200f ||
         (c >= 0x2028 && c <= 0x202e) || (c >= 0x2066 && c <= 0x2069);
}

void escape(char32_t c, std::string& out) {
  constexpr char kHex[] = "0123456789abcdef";
  switch (c) {
    case '\n': out += "\\n"; return;
    case '\r': out += "\\r"; return;
    case '\t': out += "\\t"; return;
    default: break;
  }
  out += c < 0x100 ? "\\x" : "\\u";
  for (int shift = c < 0x100 ? 4 : 12; shift >= 0; shift -= 4) out += kHex[(c >> shift) & 15];
}

}  // namespace

std::string printable(const std::string& text, size_t longest) {
  // Cut first: an escape is never cut, and a character that is becomes U+FFFD.
  const bool whole = text.size() <= longest;
  const std::string cut =
      whole ? text : text.substr(0, longest / 2) + " ... " + text.substr(text.size() - longest / 2);
  std::string out;
  for (size_t at = 0; at < cut.size();) {
    const unicode::Decoded one = unicode::decode(cut, at);
    at += one.bytes;
    if (is_control(one.code)) {
      escape(one.code, out);
    } else {
      unicode::append(one.code, out);
    }
  }
  return out;
}

struct Error::Parts {
  std::string where, problem, fix;
};

Error::Error(const std::string& where, const std::string& problem, const std::string& fix)
    : Error(Parts{printable(where, kLongest), printable(problem, kLongest),
                  printable(fix, kLongest)}) {}

Error::Error(Parts parts)
    : std::runtime_error(parts.where + ": " + parts.problem + ". " + parts.fix + "."),
      where_(std::move(parts.where)),
      problem_(std::move(parts.problem)),
      fix_(std::move(parts.fix)) {}

}  // namespace anybit
