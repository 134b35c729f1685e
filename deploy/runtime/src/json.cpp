// Reads files, and JSON in them.
#include "json.hpp"

#include <cerrno>
#include <cstring>
#include <fstream>
#include <iterator>

namespace anybit {

std::string read_file(const std::string& path, const std::string& fix) {
  errno = 0;
  std::ifstream file(path, std::ios::binary);
  std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (!file.is_open() || file.bad()) {
    const std::string why = errno != 0 ? std::strerror(errno) : "it cannot be read";
    throw Error(path, "got no file (" + why + "), expected one that can be read", fix);
  }
  return text;
}

nlohmann::json parse_json(std::string_view text, const std::string& where, const std::string& fix) {
  try {
    nlohmann::json value = nlohmann::json::parse(text.begin(), text.end());
    if (value.is_object()) return value;
    throw Error(where, std::string("got ") + value.type_name() + ", expected an object", fix);
  } catch (const nlohmann::json::exception& error) {
    throw Error(where, std::string("got no JSON (") + error.what() + "), expected an object", fix);
  }
}

}  // namespace anybit
