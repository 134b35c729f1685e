// Reads files, and JSON in them.
#include "json.hpp"

#include <cerrno>
#include <cstring>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>

namespace anybit {

using nlohmann::json;

Field Field::at(const std::string& name) const {
  static const json kNull;
  if (!value_->is_object()) refuse("an object");
  const auto found = value_->find(name);
  return {found == value_->end() ? kNull : *found, where_ + ", " + name, *fix_};
}

Field Field::at(size_t index) const {
  return {(*value_)[index], where_ + "[" + std::to_string(index) + "]", *fix_};
}

bool Field::is_null() const { return value_->is_null(); }

size_t Field::items() const {
  if (!value_->is_array()) refuse("a list");
  return value_->size();
}

std::vector<std::string> Field::names() const {
  if (!value_->is_object()) refuse("an object");
  std::vector<std::string> found;
  for (const auto& [name, value] : value_->items()) found.push_back(name);
  return found;
}

const std::string& Field::text() const {
  if (!value_->is_string()) refuse("a string");
  return value_->get_ref<const std::string&>();
}

std::string Field::text(const std::string& missing) const { return is_null() ? missing : text(); }

bool Field::flag(bool missing) const {
  if (is_null()) return missing;
  if (!value_->is_boolean()) refuse("true or false");
  return value_->get<bool>();
}

int32_t Field::number(int32_t most) const {
  const bool whole = value_->is_number_unsigned() && value_->get<uint64_t>() <= uint64_t(most);
  if (!whole) refuse("a whole number from 0 to " + std::to_string(most));
  return static_cast<int32_t>(value_->get<uint64_t>());
}

void Field::refuse(const std::string& expected) const {
  const std::string got = value_->is_structured()
                              ? value_->type_name()
                              : value_->dump(-1, ' ', false, json::error_handler_t::replace);
  throw Error(where_, "got " + printable(got) + ", expected " + expected, *fix_);
}

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

json parse_json(std::string_view text, const std::string& where, const std::string& fix) {
  try {
    json value = json::parse(text.begin(), text.end());
    if (value.is_object()) return value;
    throw Error(where, std::string("got ") + value.type_name() + ", expected an object", fix);
  } catch (const json::exception& error) {
    throw Error(where, std::string("got no JSON (") + error.what() + "), expected an object", fix);
  }
}

}  // namespace anybit
