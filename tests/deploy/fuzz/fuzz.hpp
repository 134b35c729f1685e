// What is fuzzed: each target gives an input that anybody may have made to what reads it. That may
// throw the error that it documents, and nothing else.
#pragma once
#include <string_view>

#include "anybit/model.hpp"

namespace anybit::fuzz {

// Each returns whether the input was accepted.
bool body(std::string_view input);           // of a request to any endpoint, JSON
bool chat_template(std::string_view input);  // chat.json
bool folder(std::string_view input);         // a file of an artifact
bool http(std::string_view input);           // what comes on a connection
bool messages(std::string_view input);       // of a chat, a JSON list
bool tokenizer(std::string_view input);      // tokenizer.json

// A model with a tokenizer of single bytes and a chat template, which cannot compute.
const Model& small_model();

}  // namespace anybit::fuzz
