// Gives damaged files to the readers of tokenizer.json and chat.json: all they may do is throw Error.
//
// The entry is libFuzzer's: with clang, compile this file and deploy/runtime/src with
// -fsanitize=fuzzer,address,undefined -DANYBIT_LIBFUZZER. Without, it is a program of its own:
// fuzz_tokens ROUNDS FILE... changes each file ROUNDS times and prints how many were accepted.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "anybit/chat.hpp"
#include "anybit/error.hpp"
#include "anybit/tokenizer.hpp"

namespace {

// Spaces, cases, marks, Hangul, an emoji of several parts, half a character, a special token.
const std::string kText =
    "It's  A  te\xcc\x81st 123\r\n\n \xe1\x84\x80\xe1\x85\xa1 "
    "\xf0\x9f\x91\xa8\xe2\x80\x8d\xf0\x9f\x91"
    "\xa9 \xff\xe2\x82 <s>x</s><|end|> \xe2\x96\x81\xe2\x96\x81y";

void use(const anybit::Tokenizer& tokenizer) {
  const std::vector<int32_t> ids = tokenizer.encode(kText + std::string(300, 'a'));
  anybit::Tokenizer::Stream stream = tokenizer.stream();
  for (const int32_t id : ids) {
    stream.push(id);
    // Whatever the file says, a token that is given has text.
    if (!tokenizer.token(id) && id >= 0 && static_cast<size_t>(id) < tokenizer.vocab()) continue;
  }
  stream.finish();
  tokenizer.decode(ids, false);
  for (int32_t id = -1; id < 300; ++id) stream.push(id);
  stream.finish();
}

void use(const anybit::ChatTemplate& chat) {
  for (const char* roles : {"u", "su", "sua", "uau", "suau", "x"}) {
    std::vector<anybit::Message> messages;
    for (const char* role = roles; *role; ++role) {
      const std::string name = *role == 'u' ? "user" : *role == 's' ? "system" : "assistant";
      messages.push_back({name, *role == 'x' ? "\xff" : "  a\n b\xc2\xa0 "});
    }
    try {
      chat.render(messages, roles[0] == 'u');
    } catch (const anybit::Error&) {
    }
  }
}

bool accepted = false;  // whether the last input was

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string text(reinterpret_cast<const char*>(data), size);
  accepted = false;
  try {
    use(anybit::Tokenizer::parse(text));
    accepted = true;
  } catch (const anybit::Error&) {
  }
  try {
    use(anybit::ChatTemplate::parse(text));
    accepted = true;
  } catch (const anybit::Error&) {
  }
  return 0;
}

#ifndef ANYBIT_LIBFUZZER

namespace {

// A few changes: bytes, pieces left out, doubled or put elsewhere, numbers.
std::string changed(std::string text, std::mt19937_64& random) {
  const auto below = [&](size_t limit) { return limit == 0 ? 0 : random() % limit; };
  for (size_t i = below(4) + 1; i > 0 && !text.empty(); --i) {
    const size_t at = below(text.size()), length = below(std::min<size_t>(64, text.size() - at));
    switch (below(6)) {
      case 0: text[at] = static_cast<char>(random()); break;
      case 1: text[at] = "{}[]\",:0-e\\ \x7f"[below(13)]; break;
      case 2: text.erase(at, length); break;
      case 3: text.insert(below(text.size()), text.substr(at, length)); break;
      case 4: {
        const size_t digit = text.find_first_of("0123456789", at);
        if (digit != text.npos) text.replace(digit, 1, std::to_string(random() >> below(64)));
        break;
      }
      default: {
        const char* const words[] = {"null", "true", "[]", "{}", "\"\"", "-1", "1e99"};
        const size_t colon = text.find(':', at);
        if (colon != text.npos) text.insert(colon + 1, std::string(words[below(7)]) + ",\"x\":");
      }
    }
  }
  return text;
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 3) return 2;
  std::mt19937_64 random(1);
  int taken = 0;
  for (int i = 2; i < count; ++i) {
    std::ifstream file(arguments[i], std::ios::binary);
    const std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
    for (int round = std::atoi(arguments[1]); round >= 0; --round) {
      const std::string input = round == 0 ? text : changed(text, random);
      LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(input.data()), input.size());
      taken += accepted;
    }
    if (!accepted) return 3;  // the last round is the file as it is
  }
  std::printf("%d\n", taken);
}

#endif
