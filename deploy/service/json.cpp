// The bounds of a body, and the messages about its fields.
#include "service/json.hpp"

#include <anybit/error.hpp>
#include <cmath>

namespace anybit::service {
namespace {

constexpr int kDeepest = 32;
constexpr size_t kMostValues = 1u << 20;  // a prompt of token ids has one for each

std::string type_of(int status) {
  if (status == 401) return "authentication_error";
  if (status == 429) return "rate_limit_error";
  return status < 500 ? "invalid_request_error" : "server_error";
}

std::string text_of(double value) { return Json(value).dump(); }

template <class T>
std::string range(T least, T most) {
  return Json(least).dump() + " to " + Json(most).dump();
}

}  // namespace

Ordered ApiError::json() const {
  Ordered error{{"message", what()}, {"type", type_of(status)}};
  error["param"] = param.empty() ? Ordered(nullptr) : Ordered(param);
  error["code"] = code;
  return {{"error", std::move(error)}};
}

ApiError bad_request(const std::string& param, const std::string& problem, const std::string& fix,
                     const std::string& code) {
  return ApiError(400, code, param + ": " + problem + ". " + fix + ".", param);
}

Json parse_object(std::string_view body) {
  size_t values = 0;
  const auto bound = [&values](int depth, Json::parse_event_t, Json&) {
    if (depth > kDeepest) {
      throw bad_request("body", "got JSON nested more deeply than " + std::to_string(kDeepest),
                        "Send a flatter object", "invalid_json");
    }
    if (++values > kMostValues) {
      throw bad_request("body", "got more than " + std::to_string(kMostValues) + " JSON values",
                        "Send fewer", "invalid_json");
    }
    return true;
  };
  Json value;
  try {
    value = Json::parse(body.begin(), body.end(), bound);
  } catch (const Json::exception& error) {
    // Behind the library's own prefix: "[json.exception.parse_error.101] parse error at ...".
    std::string reason = error.what();
    if (const size_t end = reason.find("] "); end != std::string::npos) reason.erase(0, end + 2);
    throw bad_request("body", "got no valid JSON (" + reason.substr(0, 200) + ")",
                      "Send one JSON object in UTF-8", "invalid_json");
  }
  if (!value.is_object()) {
    throw bad_request("body", "got " + shown(value) + ", expected a JSON object",
                      "Send the fields between { and }", "invalid_json");
  }
  return value;
}

std::string dump(const Ordered& value) {
  return value.dump(-1, ' ', false, Ordered::error_handler_t::replace);
}

std::string shown(const Json& value) {
  constexpr size_t kLongest = 60;
  if (value.is_array() && value.size() > 16) {
    return "a list of " + std::to_string(value.size());
  }
  std::string text = value.dump(-1, ' ', true, Json::error_handler_t::replace);
  if (text.size() > kLongest) text = text.substr(0, kLongest) + " ...";
  return text;
}

const Json* Fields::find(const std::string& name) {
  seen_.insert(name);
  const auto found = object_.find(name);
  return found == object_.end() || found->is_null() ? nullptr : &*found;
}

std::optional<double> Fields::number(const std::string& name, double least, double most) {
  const Json* value = find(name);
  if (!value) return std::nullopt;
  if (!value->is_number() || !(value->get<double>() >= least && value->get<double>() <= most)) {
    throw bad_request(path(name),
                      "got " + shown(*value) + ", expected a number of " + text_of(least) + " to " +
                          text_of(most),
                      "Give such a number, or leave the field out");
  }
  return value->get<double>();
}

std::optional<int64_t> Fields::whole(const std::string& name, int64_t least, int64_t most) {
  const Json* value = find(name);
  if (!value) return std::nullopt;
  const auto wrong = [&] {
    return bad_request(
        path(name), "got " + shown(*value) + ", expected a whole number of " + range(least, most),
        "Give such a number, or leave the field out");
  };
  if (value->is_number_unsigned() && value->get<uint64_t>() > uint64_t{INT64_MAX}) throw wrong();
  if (value->is_number_float()) {  // 128.0, as some clients write whole numbers
    const double number = value->get<double>();
    if (number != std::floor(number) || std::fabs(number) > 9e15) throw wrong();
  } else if (!value->is_number()) {
    throw wrong();
  }
  const int64_t number = value->get<int64_t>();
  if (number < least || number > most) throw wrong();
  return number;
}

std::optional<bool> Fields::boolean(const std::string& name) {
  const Json* value = find(name);
  if (!value) return std::nullopt;
  if (!value->is_boolean()) {
    throw bad_request(path(name), "got " + shown(*value) + ", expected true or false",
                      "Give one, or leave the field out");
  }
  return value->get<bool>();
}

std::optional<std::string> Fields::text(const std::string& name) {
  const Json* value = find(name);
  if (!value) return std::nullopt;
  if (!value->is_string()) {
    throw bad_request(path(name), "got " + shown(*value) + ", expected text",
                      "Give a string, or leave the field out");
  }
  return value->get<std::string>();
}

std::vector<std::string> Fields::texts(const std::string& name, size_t most) {
  const Json* value = find(name);
  if (!value) return {};
  const auto is_text = [](const Json& one) {
    return one.is_string() && !one.get_ref<const std::string&>().empty();
  };
  bool good = is_text(*value);
  if (value->is_array())
    good = value->size() <= most && std::all_of(value->begin(), value->end(), is_text);
  if (!good) {
    throw bad_request(path(name),
                      "got " + shown(*value) + ", expected a text or a list of at most " +
                          std::to_string(most) + ", none of them empty",
                      "Give such texts, or leave the field out");
  }
  if (value->is_string()) return {value->get<std::string>()};
  return value->get<std::vector<std::string>>();
}

std::vector<int32_t> Fields::ids(const std::string& name, int vocab) {
  const Json* value = find(name);
  return value ? token_ids(*value, path(name), vocab) : std::vector<int32_t>{};
}

void Fields::only(const std::string& name, const Json& allowed, const std::string& fix) {
  const Json* value = find(name);
  if (value && *value != allowed) {
    throw bad_request(path(name), "got " + shown(*value) + ", expected " + shown(allowed), fix,
                      "unsupported_value");
  }
}

void Fields::refuse_others() const {
  for (const auto& [name, value] : object_.items()) {
    if (!seen_.count(name)) {
      throw bad_request(path(printable(name, 60)), "got a field that this server does not know",
                        "Leave it out, or correct its name", "unknown_parameter");
    }
  }
}

std::vector<int32_t> token_ids(const Json& list, const std::string& where, int vocab) {
  std::vector<int32_t> ids;
  const auto wrong = [&](const Json& value) {
    return bad_request(where,
                       "got " + shown(value) + ", expected token ids of " + range(0, vocab - 1),
                       "Give a list of such whole numbers");
  };
  if (!list.is_array()) throw wrong(list);
  ids.reserve(list.size());
  for (const Json& one : list) {
    if (!one.is_number_unsigned() || one.get<uint64_t>() >= static_cast<uint64_t>(vocab)) {
      throw wrong(one);
    }
    ids.push_back(one.get<int32_t>());
  }
  return ids;
}

}  // namespace anybit::service
