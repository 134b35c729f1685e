// Conversations: a JSON list as a client sends it, and one message of any bytes.
#include "anybit/error.hpp"
#include "fuzz.hpp"
#include "service/api.hpp"

namespace anybit::fuzz {

bool messages(std::string_view input) {
  using namespace service;
  const std::string text(input);
  for (const char* role : {"user", "assistant", "system"}) {
    try {
      const std::string prompt =
          small_model().chat().render({{"user", "x"}, {role, text}, {"user", text}}, true);
      small_model().tokenizer().encode(prompt, false);
    } catch (const Error&) {
    }
  }
  try {
    read_call(Endpoint::chat, "{\"messages\": " + text + "}", small_model(), "small", {32, 4});
    return true;
  } catch (const ApiError& error) {
    dump(error.json());
    return false;
  }
}

}  // namespace anybit::fuzz
