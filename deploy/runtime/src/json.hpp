// Fields of JSON that anybody may have written: each is looked at as it is read, and an Error names
// the one that is wrong.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "anybit/error.hpp"

namespace anybit {

class Field {
 public:
  // where: of the file; fix: what to do about a damaged one. All outlive the field.
  Field(const nlohmann::json& value, std::string where, const std::string& fix)
      : value_(&value), where_(std::move(where)), fix_(&fix) {}

  const nlohmann::json& value() const { return *value_; }
  const std::string& where() const { return where_; }
  const std::string& fix() const { return *fix_; }

  // What is in the object under a name; one that is missing is null.
  Field at(const std::string& name) const {
    static const nlohmann::json kNull;
    if (!value_->is_object()) refuse("an object");
    const auto found = value_->find(name);
    return {found == value_->end() ? kNull : *found, where_ + ", " + name, *fix_};
  }
  Field at(size_t index) const {
    return {(*value_)[index], where_ + "[" + std::to_string(index) + "]", *fix_};
  }

  bool is_null() const { return value_->is_null(); }
  size_t items() const {
    if (!value_->is_array()) refuse("a list");
    return value_->size();
  }
  const std::string& text() const {
    if (!value_->is_string()) refuse("a string");
    return value_->get_ref<const std::string&>();
  }
  std::string text(const std::string& missing) const { return is_null() ? missing : text(); }
  bool flag(bool missing) const {
    if (is_null()) return missing;
    if (!value_->is_boolean()) refuse("true or false");
    return value_->get<bool>();
  }
  // A whole number from 0 to `most`.
  int32_t number(int32_t most) const {
    const bool whole = value_->is_number_unsigned() && value_->get<uint64_t>() <= uint64_t(most);
    if (!whole) refuse("a whole number from 0 to " + std::to_string(most));
    return static_cast<int32_t>(value_->get<uint64_t>());
  }

  [[noreturn]] void refuse(const std::string& expected) const {
    const bool scalar = !value_->is_structured();
    const std::string got = scalar ? value_->dump(-1, ' ', false, Replace) : value_->type_name();
    throw Error(where_, "got " + printable(got) + ", expected " + expected, *fix_);
  }

 private:
  static constexpr auto Replace = nlohmann::json::error_handler_t::replace;

  const nlohmann::json* value_;
  std::string where_;
  const std::string* fix_;
};

// The content of a file.
//
// Throws Error: there is none, or it cannot be read.
std::string read_file(const std::string& path, const std::string& fix);

// The object that a text holds.
//
// Throws Error: it is no JSON, or no object.
nlohmann::json parse_json(std::string_view text, const std::string& where, const std::string& fix);

}  // namespace anybit
