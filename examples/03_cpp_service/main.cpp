// Streams the continuations of some prompts, all at once, from an artifact: stream OUT PROMPT...
#include <anybit/anybit.hpp>
#include <iostream>
#include <vector>

int main(int argc, char** argv) try {
  if (argc < 3) {
    std::cerr << "usage: stream OUT PROMPT...\n";
    return 2;
  }
  anybit::LoadOptions options;
  options.slots = argc - 2;
  const auto model = anybit::Model::load(argv[1], options);
  std::cerr << model->card().name << " on " << model->card().backend
            << "; memory: " << model->card().memory.text() << "\n";

  anybit::Engine engine(model);
  std::vector<anybit::Handle> handles;
  for (int i = 2; i < argc; ++i) {
    anybit::Request request;
    request.text = argv[i];
    request.max_new_tokens = 32;
    request.on_token = [i](const anybit::Token& token) {  // on the engine's thread
      std::cout << i - 1 << ": " << token.text << std::endl;
    };
    handles.push_back(engine.submit(std::move(request)));
  }
  for (const anybit::Handle& handle : handles) {
    const anybit::Finish finish = handle.wait();
    if (!finish.text.empty()) {  // held back, and no stop string came of it
      std::cout << handle.id() << ": " << finish.text << std::endl;
    }
    std::cerr << handle.id() << ": " << finish.completion_tokens << " tokens, "
              << anybit::name(finish.reason) << " " << finish.detail << "\n";
  }
  return 0;
} catch (const anybit::Error& error) {
  std::cerr << error.what() << "\n";
  return 2;
}
