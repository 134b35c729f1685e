// tokenizer.json from anywhere: read, and used on texts that are hard.
#include "anybit/tokenizer.hpp"

#include <string>
#include <vector>

#include "anybit/error.hpp"
#include "fuzz.hpp"

namespace anybit::fuzz {
namespace {

// Spaces, cases, marks, Hangul, an emoji of several parts, half a character, a special token.
const std::string kText =
    "It's  A  te\xcc\x81st 123\r\n\n \xe1\x84\x80\xe1\x85\xa1 "
    "\xf0\x9f\x91\xa8\xe2\x80\x8d\xf0\x9f\x91"
    "\xa9 \xff\xe2\x82 <s>x</s><|end|> \xe2\x96\x81\xe2\x96\x81y";

void use(const Tokenizer& tokenizer) {
  const std::vector<int32_t> ids = tokenizer.encode(kText + std::string(300, 'a'));
  Tokenizer::Stream stream = tokenizer.stream();
  for (const int32_t id : ids) stream.push(id);
  stream.finish();
  tokenizer.decode(ids, false);
  for (int32_t id = -1; id < 300; ++id) stream.push(id);
  stream.finish();
}

}  // namespace

bool tokenizer(std::string_view input) {
  try {
    use(Tokenizer::parse(input));
    return true;
  } catch (const Error&) {
    return false;
  }
}

}  // namespace anybit::fuzz
