// Bodies of requests to each endpoint, as clients send them.
#include "fuzz.hpp"
#include "service/api.hpp"

namespace anybit::fuzz {

bool body(std::string_view input) {
  using namespace service;
  bool accepted = false;
  const auto give = [&](const auto& reader) {
    try {
      reader();
      accepted = true;
    } catch (const ApiError& error) {
      dump(error.json());
    }
  };
  for (const Endpoint endpoint : {Endpoint::completions, Endpoint::chat}) {
    give([&] {
      const Call call = read_call(endpoint, input, small_model(), "small", {32, 4});
      for (size_t choice = 0; choice < call.prompts.size() * static_cast<size_t>(call.n);
           ++choice) {
        call.request(choice);
      }
      Answers answers(call, small_model(), "small", "id");
      answers.event(0, {65, "A", -1, {{66, -2}}});
    });
  }
  give([&] { dump(tokenize(input, small_model())); });
  give([&] { dump(detokenize(input, small_model())); });
  return accepted;
}

}  // namespace anybit::fuzz
