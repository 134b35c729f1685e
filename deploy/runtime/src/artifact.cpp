// Reads OUT/onnx, or that folder alone, by the rules of calibration/out.
#include "artifact.hpp"

#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>

#include "anybit/error.hpp"
#include "sha256.hpp"

namespace anybit {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

constexpr int kFormat = 1;               // of model.json and manifest.json
constexpr uint64_t kMostJson = 8 << 20;  // bytes; a report has 300 KB
constexpr int64_t kMostSize = INT32_MAX;
const char* const kMake = "python -m exporter MODEL --wbits W --abits A";
const char* const kDamaged = "The artifact is damaged: make this stage again";
const char* const kUnreadable = "It is truncated or damaged: make this stage again";

// The size of a regular file; a pipe or a device would never end.
uint64_t regular(const fs::path& path, const std::string& expected, const std::string& fix) {
  std::error_code error;
  const fs::file_status status = fs::status(path, error);
  std::string got;
  switch (status.type()) {
    case fs::file_type::regular: return fs::file_size(path);
    case fs::file_type::not_found: got = "no such file"; break;
    case fs::file_type::directory: got = "a folder"; break;
    case fs::file_type::fifo: got = "a pipe"; break;
    case fs::file_type::none: got = error.message(); break;
    default: got = "no regular file"; break;
  }
  throw Error(path.string(), "got " + got + ", expected " + expected, fix);
}

std::string shown(const Json& value) {
  if (value.is_object()) return "an object";
  if (value.is_array()) return "a list of " + std::to_string(value.size());
  return printable(value.dump(-1, ' ', false, Json::error_handler_t::replace), 60);
}

// A value of a JSON file, and its place for messages.
class Field {
 public:
  Field(const Json& value, std::string where, std::string name)
      : value_(value), where_(std::move(where)), name_(std::move(name)) {}

  bool has(const char* name) const {
    return value_.is_object() && value_.contains(name) && !value_[name].is_null();
  }

  Field at(const std::string& name) const {
    if (!value_.is_object()) refuse("an object");
    const auto found = value_.find(name);
    if (found == value_.end()) {
      throw Error(place(), "got no " + name + ", expected a whole record", kUnreadable);
    }
    return Field(*found, where_, name_.empty() ? name : name_ + "." + name);
  }

  int64_t whole(int64_t least, int64_t most) const {
    if (!value_.is_number_integer()) refuse("a whole number");
    const double rough = value_.get<double>();  // an unsigned one may be beyond int64
    if (rough < double(least) || rough > double(most)) {
      refuse(std::to_string(least) + " to " + std::to_string(most));
    }
    return value_.get<int64_t>();
  }

  int size() const { return static_cast<int>(whole(1, kMostSize)); }

  double number() const {
    if (!value_.is_number()) refuse("a number");
    return value_.get<double>();
  }

  std::string text() const {
    if (!value_.is_string()) refuse("a string");
    return value_.get<std::string>();
  }

  bool flag() const {
    if (!value_.is_boolean()) refuse("true or false");
    return value_.get<bool>();
  }

  std::vector<Field> list() const {
    if (!value_.is_array()) refuse("a list");
    std::vector<Field> fields;
    for (size_t i = 0; i < value_.size(); ++i) {
      fields.emplace_back(value_[i], where_, name_ + "[" + std::to_string(i) + "]");
    }
    return fields;
  }

  std::map<std::string, Field> entries() const {
    if (!value_.is_object()) refuse("an object");
    std::map<std::string, Field> fields;
    for (const auto& [key, value] : value_.items()) {
      fields.emplace(key, Field(value, where_, name_ + "[\"" + key + "\"]"));
    }
    return fields;
  }

  [[noreturn]] void refuse(const std::string& expected) const {
    throw Error(place(), "got " + shown(value_) + ", expected " + expected, kUnreadable);
  }

 private:
  std::string place() const { return name_.empty() ? where_ : where_ + ", " + name_; }

  const Json& value_;
  std::string where_, name_;
};

Json read_json(const fs::path& path, const std::string& expected, const std::string& fix) {
  const uint64_t size = regular(path, expected, fix);
  if (size > kMostJson) {
    throw Error(path.string(),
                "got " + std::to_string(size) + " bytes, expected JSON of at most " +
                    std::to_string(kMostJson >> 20) + " MB",
                fix);
  }
  std::string text(size, '\0');
  std::ifstream file(path, std::ios::binary);
  if (!file.read(text.data(), static_cast<std::streamsize>(size))) {
    throw Error(path.string(), "got a file that cannot be read, expected a JSON file",
                "Check the permissions");
  }
  // The parser calls itself for nothing, however deep a file is nested.
  Json value = Json::parse(text, nullptr, false);
  if (value.is_discarded()) {
    throw Error(path.string(), "got unreadable JSON, expected a whole file", fix);
  }
  if (!value.is_object()) {
    throw Error(path.string(), "got " + shown(value) + ", expected a JSON object", fix);
  }
  return value;
}

void check_format(const Json& value, const fs::path& path, const std::string& fix) {
  const Json format = value.value("format", Json());
  if (format != kFormat) {
    throw Error(path.string(), "got format " + shown(format) + ", expected 1", fix);
  }
}

bool is_name(const std::string& name) {
  if (name.empty() || name[0] == '/') return false;
  for (const unsigned char c : name) {
    if (c < 0x20 || c == 0x7f || c == '\\') return false;
  }
  for (const auto& part : fs::path(name)) {
    if (part == "..") return false;
  }
  return true;
}

bool is_sha256(const std::string& text) {
  return text.size() == 64 && text.find_first_not_of("0123456789abcdef") == std::string::npos;
}

Description describe(const Field& file) {
  Description made;
  made.model = file.at("model").text();
  made.family = file.at("family").text();
  made.scheme = file.at("scheme").text();
  made.method = file.at("method").text();
  made.dtype = file.at("dtype").text();
  made.hidden = file.at("sizes").at("hidden_size").size();
  made.intermediate = file.at("sizes").at("intermediate_size").size();
  made.heads = file.at("sizes").at("num_attention_heads").size();
  made.vocab = file.at("sizes").at("vocab_size").size();
  made.context = file.at("context").size();
  made.max_context = file.at("max_context").size();
  for (const Field& token : file.at("eos_token_ids").list()) {
    made.end_tokens.push_back(static_cast<int32_t>(token.whole(0, kMostSize)));
  }
  if (file.has("sampling")) {
    const Field sampling = file.at("sampling");
    const bool draws = sampling.at("do_sample").flag();
    made.sampling.repetition_penalty =
        static_cast<float>(sampling.at("repetition_penalty").number());
    if (draws) {
      made.sampling.temperature = static_cast<float>(sampling.at("temperature").number());
      made.sampling.top_k = static_cast<int>(sampling.at("top_k").whole(0, kMostSize));
      made.sampling.top_p = static_cast<float>(sampling.at("top_p").number());
    }
  }
  const Field cache = file.at("cache");
  made.cache.layers = cache.at("layers").size();
  made.cache.heads = cache.at("heads").size();
  made.cache.head_dim = cache.at("head_dim").size();
  made.cache.bits = static_cast<int>(cache.at("bits").whole(1, 16));
  made.cache.dtype = cache.at("dtype").text();
  made.cache.past = cache.at("past").text();
  made.cache.present = cache.at("present").text();
  for (const Field& part : cache.at("parts").list()) made.cache.parts.push_back(part.text());
  made.cache.form = cache.has("form") ? cache.at("form").text() : "concat";
  if (made.cache.form == "static") {
    made.cache.capacity = cache.at("capacity").size();
  } else if (made.cache.form != "concat") {
    cache.at("form").refuse("concat or static");
  }
  return made;
}

// Whether the report beside the model found everything right.
std::string read_proof(const fs::path& path) {
  if (!fs::is_regular_file(path)) return "unknown";
  try {
    const Json report = read_json(path, "a report", kUnreadable);
    return Field(report, path.string(), "").at("validation").at("ok").flag() ? "passed" : "failed";
  } catch (const Error&) {  // a folder runs without its report
    return "unknown";
  }
}

}  // namespace

Artifact::Artifact(const fs::path& folder) {
  std::error_code ignored;
  if (!fs::is_directory(folder, ignored)) {
    throw Error(folder.string(),
                std::string("got ") + (fs::exists(folder, ignored) ? "a file" : "no such folder") +
                    ", expected an artifact folder",
                std::string("Make one with: ") + kMake + " --out DIR");
  }
  const fs::path manifest_path = folder / "manifest.json";
  const bool whole = fs::exists(manifest_path, ignored);
  path_ = whole ? folder / "onnx" : folder;
  renew_ = std::string("Renew it with: ") + kMake + " --until onnx --out " +
           (whole ? folder.string() : "OUT") + " --resume";
  const auto missing = [&] {
    return Error(folder.string(), "got no onnx folder, expected it for the ONNX Runtime backend",
                 std::string("Make it with: ") + kMake + " --until onnx --out " + folder.string());
  };
  Json manifest;
  if (whole) {
    manifest = read_json(manifest_path, "it", renew_);
    check_format(manifest, manifest_path, renew_);
    const Field stages = Field(manifest, manifest_path.string(), "").at("stages");
    if (!stages.has("onnx") || !fs::is_directory(path_, ignored)) throw missing();
  } else if (!fs::is_regular_file(path_ / "model.onnx", ignored)) {
    throw missing();
  }
  const fs::path description_path = path_ / "model.json";
  const Json json = read_json(description_path, "it in a folder made by this version", renew_);
  check_format(json, description_path, renew_);
  const Field file(json, description_path.string(), "");
  const Field files =
      whole ? Field(manifest, manifest_path.string(), "").at("stages").at("onnx").at("files")
            : file.at("files");
  for (const auto& [name, record] : files.entries()) {
    if (!is_name(name)) {
      throw Error(
          whole ? manifest_path.string() : description_path.string(),
          "got a file called " + printable(name) + ", expected the name of a file in this folder",
          kUnreadable);
    }
    Record& made = records_[name];
    made.bytes = static_cast<uint64_t>(record.at("bytes").whole(0, int64_t{1} << 62));
    made.sha256 = record.at("sha256").text();
    if (!is_sha256(made.sha256)) record.at("sha256").refuse("64 hexadecimal digits");
  }
  if (whole) this->file("model.json", true);
  description_ = describe(file);
  if (whole) proof_ = read_proof(folder / "report" / "report.json");
}

fs::path Artifact::file(const std::string& name, bool hash) const {
  const fs::path path = path_ / name;
  const auto found = records_.find(name);
  if (found == records_.end()) {
    throw Error(path.string(), "got a file without a record, expected one of this stage's", renew_);
  }
  const Record& record = found->second;
  const uint64_t size = regular(path, "it from the manifest", kDamaged);
  if (size != record.bytes) {
    throw Error(path.string(),
                "got " + std::to_string(size) + " bytes, expected " + std::to_string(record.bytes),
                kDamaged);
  }
  if (hash) {
    const std::string got = sha256_file(path);
    if (got != record.sha256) {
      throw Error(path.string(),
                  "got SHA-256 " + got.substr(0, 12) + "..., expected " +
                      record.sha256.substr(0, 12) + "...",
                  kDamaged);
    }
  }
  return path;
}

}  // namespace anybit
