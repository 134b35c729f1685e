// JSON as clients send it: bounded in depth and in size, and read field by field with messages that
// say what was expected.
#pragma once
#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace anybit::service {

// What came in. Objects are trees: a list of pairs would be searched from its start for each key.
using Json = nlohmann::json;
// What goes out, in the order in which it is written down.
using Ordered = nlohmann::ordered_json;

// An answer that is an error, in the form of OpenAI's API.
struct ApiError : std::runtime_error {
  ApiError(int status, std::string code, const std::string& message, std::string param = "")
      : std::runtime_error(message),
        status(status),
        code(std::move(code)),
        param(std::move(param)) {}
  int status;
  std::string code, param;
  int retry_after = 0;  // seconds; 0: not said

  // {"error": {"message", "type", "param", "code"}}
  Ordered json() const;
};

// Of a request that is wrong as it is.
ApiError bad_request(const std::string& param, const std::string& problem, const std::string& fix,
                     const std::string& code = "invalid_value");

// Parses a body.
//
// Throws ApiError: it is no JSON object, is nested too deeply, or has too many values.
Json parse_object(std::string_view body);

// Text for the wire; bytes that are not UTF-8 become U+FFFD.
std::string dump(const Ordered& value);

// A value as a message shows it, short.
std::string shown(const Json& value);

// Reads an object's fields, each once; null counts as left out. Every function throws ApiError with
// the field's name where the value is another than expected.
class Fields {
 public:
  explicit Fields(const Json& object, std::string prefix = "")
      : object_(object), prefix_(std::move(prefix)) {}

  // The value, or nullptr.
  const Json* find(const std::string& name);
  std::optional<double> number(const std::string& name, double least, double most);
  std::optional<int64_t> whole(const std::string& name, int64_t least, int64_t most);
  std::optional<bool> boolean(const std::string& name);
  std::optional<std::string> text(const std::string& name);
  // A text or a list of at most `most` texts, none of them empty.
  std::vector<std::string> texts(const std::string& name, size_t most);
  // A list of token ids below `vocab`.
  std::vector<int32_t> ids(const std::string& name, int vocab);

  // Fields that change nothing here, whatever they say.
  void ignore(std::initializer_list<const char*> names) {
    seen_.insert(names.begin(), names.end());
  }
  // A field that is taken where it has this value only, as another would change the result.
  void only(const std::string& name, const Json& value, const std::string& fix);
  // Throws for the first field that nobody has asked for.
  void refuse_others() const;

  std::string path(const std::string& name) const { return prefix_ + name; }

 private:
  const Json& object_;
  std::string prefix_;
  std::set<std::string> seen_;
};

// A list of token ids below `vocab`; `where` names it.
std::vector<int32_t> token_ids(const Json& list, const std::string& where, int vocab);

}  // namespace anybit::service
