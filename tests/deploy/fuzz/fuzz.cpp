// Runs the targets of fuzz.hpp, in either of two ways.
//
// With clang and -DANYBIT_FUZZ=TARGET this is libFuzzer's entry; docs/runtime.md has the command.
// Without, it is a program of its own that any compiler makes: fuzz TARGET ROUNDS FILE... gives each
// file to the target, then ROUNDS changed ones, the same in every run, and prints as JSON how many were
// accepted of either.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "fuzz.hpp"

#ifdef ANYBIT_FUZZ

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  anybit::fuzz::ANYBIT_FUZZ({reinterpret_cast<const char*>(data), size});
  return 0;
}

#else

namespace {

using namespace anybit::fuzz;

const std::map<std::string, bool (*)(std::string_view)> kTargets{
    {"body", body}, {"chat_template", chat_template}, {"folder", folder},
    {"http", http}, {"messages", messages},           {"tokenizer", tokenizer}};

// One to four changes: bytes, pieces left out, doubled or put elsewhere, numbers, another's piece.
std::string changed(std::string text, const std::string& other, std::mt19937_64& random) {
  const auto below = [&](size_t limit) { return limit == 0 ? 0 : random() % limit; };
  for (size_t i = below(4) + 1; i > 0 && !text.empty(); --i) {
    const size_t at = below(text.size()), length = below(std::min<size_t>(64, text.size() - at));
    switch (below(7)) {
      case 0: text[at] = static_cast<char>(random()); break;
      case 1: text[at] = "{}[]\",:0-e\\ \x7f"[below(13)]; break;
      case 2: text.erase(at, length); break;
      case 3: text.insert(below(text.size()), text.substr(at, length)); break;
      case 4: {
        const size_t digit = text.find_first_of("0123456789", at);
        if (digit != text.npos) text.replace(digit, 1, std::to_string(random() >> below(64)));
        break;
      }
      case 5: text.insert(at, other.substr(below(other.size()), below(256))); break;
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
  if (count < 4 || kTargets.count(arguments[1]) == 0) return 2;
  const auto target = kTargets.at(arguments[1]);
  std::vector<std::string> seeds;
  int good = 0, taken = 0;
  for (int i = 3; i < count; ++i) {
    std::ifstream file(arguments[i], std::ios::binary);
    seeds.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
    good += target(seeds.back());
  }
  std::mt19937_64 random(1);
  const auto one = [&]() -> const std::string& { return seeds[random() % seeds.size()]; };
  for (int round = std::atoi(arguments[2]); round > 0; --round) {
    taken += target(changed(one(), one(), random));
  }
  std::printf("{\"seeds\": %d, \"changed\": %d}\n", good, taken);
}

#endif
