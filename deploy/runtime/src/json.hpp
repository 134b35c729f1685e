// Fields of JSON that anybody may have written: each is looked at as it is read, and an Error names
// the one that is wrong.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "anybit/error.hpp"

namespace anybit {

constexpr int kMostDepth = 16;         // of sequences in each other, in a tokenizer's file
constexpr int32_t kMostIds = 1 << 22;  // of a vocabulary

class Field {
 public:
  // where: of the file; fix: what to do about a damaged one. `value` and `fix` outlive the field.
  Field(const nlohmann::json& value, std::string where, const std::string& fix)
      : value_(&value), where_(std::move(where)), fix_(&fix) {}

  const nlohmann::json& value() const { return *value_; }
  const std::string& where() const { return where_; }
  const std::string& fix() const { return *fix_; }

  // What is in the object under a name, or in the list at a place; what is missing is null.
  Field at(const std::string& name) const;
  Field at(size_t index) const;

  bool is_null() const;
  size_t items() const;                    // of a list
  std::vector<std::string> names() const;  // in an object
  const std::string& text() const;
  std::string text(const std::string& missing) const;
  bool flag(bool missing) const;
  int32_t number(int32_t most) const;  // whole, from 0

  [[noreturn]] void refuse(const std::string& expected) const;

 private:
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
