// chat.json from anywhere: read, and used on conversations of each shape.
#include "anybit/chat.hpp"
#include "anybit/error.hpp"
#include "fuzz.hpp"

namespace anybit::fuzz {
namespace {

void use(const ChatTemplate& chat) {
  for (const char* roles : {"u", "su", "sua", "uau", "suau", "x"}) {
    std::vector<Message> messages;
    for (const char* role = roles; *role; ++role) {
      const std::string name = *role == 'u' ? "user" : *role == 's' ? "system" : "assistant";
      messages.push_back({name, *role == 'x' ? "\xff" : "  a\n b\xc2\xa0 "});
    }
    try {
      chat.render(messages, roles[0] == 'u');
    } catch (const Error&) {
    }
  }
}

}  // namespace

bool chat_template(std::string_view input) {
  try {
    use(ChatTemplate::parse(input));
    return true;
  } catch (const Error&) {
    return false;
  }
}

}  // namespace anybit::fuzz
