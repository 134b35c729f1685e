// Reads OUT/onnx, or that folder alone, by the rules of calibration/out.
#include "artifact.hpp"

#include <nlohmann/json.hpp>

#include "anybit/error.hpp"
#include "json.hpp"
#include "sha256.hpp"

namespace anybit {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

constexpr int kFormat = 1;               // of model.json and manifest.json
constexpr uint64_t kMostJson = 8 << 20;  // bytes; a report has 300 KB
const char* const kMake = "python -m exporter MODEL --wbits W --abits A";
const char* const kDamaged = "The artifact is damaged: make this stage again";

// The size of a regular file; a pipe or a device would never end.
uint64_t regular(const fs::path& path, const std::string& expected, const std::string& fix) {
  std::error_code error;
  const fs::file_status status = fs::status(path, error);
  std::string got;
  switch (status.type()) {
    case fs::file_type::regular: {
      const uintmax_t size = fs::file_size(path, error);
      if (!error) return size;
      got = error.message();
      break;
    }
    case fs::file_type::not_found: got = "no such file"; break;
    case fs::file_type::directory: got = "a folder"; break;
    case fs::file_type::fifo: got = "a pipe"; break;
    case fs::file_type::none: got = error.message(); break;
    default: got = "no regular file"; break;
  }
  throw Error(path.string(), "got " + got + ", expected " + expected, fix);
}

const std::string kUnreadable = "It is truncated or damaged: make this stage again";

// A field that must be there.
Field need(const Field& record, const std::string& name) {
  Field field = record.at(name);
  if (field.is_null()) {
    throw Error(record.where(), "got no " + name + ", expected a whole record", record.fix());
  }
  return field;
}

int size(const Field& field) {
  const int value = field.number(INT32_MAX);
  if (value < 1) field.refuse("at least 1");
  return value;
}

float real(const Field& field, double least, double most) {
  if (!field.value().is_number()) field.refuse("a number");
  const auto value = field.value().get<double>();
  if (value >= least && value <= most) return static_cast<float>(value);
  field.refuse("a number of its range");
}

uint64_t bytes(const Field& field) {
  if (!field.value().is_number_unsigned()) field.refuse("a whole number");
  return field.value().get<uint64_t>();
}

Json read_record(const fs::path& path, const std::string& expected, const std::string& fix) {
  const uint64_t size = regular(path, expected, fix);
  if (size > kMostJson) {
    throw Error(path.string(),
                "got " + std::to_string(size) + " bytes, expected JSON of at most " +
                    std::to_string(kMostJson >> 20) + " MB",
                fix);
  }
  return parse_json(read_file(path.string(), fix), path.string(), fix);
}

void check_format(const Json& value, const fs::path& path, const std::string& fix) {
  const Json format = value.value("format", Json());
  if (format == kFormat) return;
  throw Error(path.string(), "got format " + printable(format.dump()) + ", expected 1", fix);
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
  made.model = need(file, "model").text();
  made.family = need(file, "family").text();
  made.scheme = need(file, "scheme").text();
  made.method = need(file, "method").text();
  made.dtype = need(file, "dtype").text();
  const Field sizes = need(file, "sizes");
  made.hidden = size(need(sizes, "hidden_size"));
  made.intermediate = size(need(sizes, "intermediate_size"));
  made.heads = size(need(sizes, "num_attention_heads"));
  made.vocab = size(need(sizes, "vocab_size"));
  made.context = size(need(file, "context"));
  made.max_context = size(need(file, "max_context"));
  const Field ends = need(file, "eos_token_ids");
  for (size_t i = 0; i < ends.items(); ++i) made.end_tokens.push_back(ends.at(i).number(INT32_MAX));
  if (const Field sampling = file.at("sampling"); !sampling.is_null()) {
    made.sampling.repetition_penalty = real(need(sampling, "repetition_penalty"), 0.01, 100);
    if (sampling.at("do_sample").flag(false)) {
      made.sampling.temperature = real(need(sampling, "temperature"), 0, 100);
      made.sampling.top_k = need(sampling, "top_k").number(INT32_MAX);
      made.sampling.top_p = real(need(sampling, "top_p"), 1e-9, 1);
    }
  }
  const Field cache = need(file, "cache");
  made.cache.layers = size(need(cache, "layers"));
  made.cache.bits = need(cache, "bits").number(16);
  made.cache.form = cache.at("form").text("concat");
  if (made.cache.form == "static") {
    made.cache.capacity = size(need(cache, "capacity"));
  } else if (made.cache.form != "concat") {
    cache.at("form").refuse("concat or static");
  }
  return made;
}

// Whether the report beside the model found everything right.
std::string read_proof(const fs::path& path) {
  std::error_code error;
  if (!fs::is_regular_file(path, error)) return "unknown";
  try {
    const Json report = read_record(path, "a report", kUnreadable);
    const Field ok = Field(report, path.string(), kUnreadable).at("validation").at("ok");
    return ok.is_null() ? "unknown" : ok.flag(false) ? "passed" : "failed";
  } catch (const Error&) {  // a folder runs without its report
    return "unknown";
  }
}

// Of a stage: its folder, a file that tells it, what runs it, and how to make it.
struct StageFacts {
  const char *name, *file, *backend, *make;
};

StageFacts facts_of(Stage stage) {
  if (stage == Stage::engine) return {"engine", "model.engine", "TensorRT", "--engine auto"};
  return {"onnx", "model.onnx", "ONNX Runtime", "--until onnx"};
}

}  // namespace

Artifact::Artifact(const fs::path& folder, Stage which) {
  const StageFacts facts = facts_of(which);
  std::error_code ignored;
  if (!fs::is_directory(folder, ignored)) {
    const char* got = folder.empty()                ? "an empty name"
                      : fs::exists(folder, ignored) ? "a file"
                                                    : "no such folder";
    throw Error(folder.empty() ? "folder" : folder.string(),
                std::string("got ") + got + ", expected an artifact folder",
                std::string("Make one with: ") + kMake + " --out DIR");
  }
  const fs::path manifest_path = folder / "manifest.json";
  const bool whole = fs::exists(manifest_path, ignored);
  path_ = whole ? folder / facts.name : folder;
  renew_ = std::string("Renew it with: ") + kMake + " " + facts.make + " --out " +
           (whole ? folder.string() : "OUT") + " --resume";
  const auto missing = [&] {
    return NoStage(
        folder.string(),
        std::string("got no ") + facts.name + " folder, expected it for the " + facts.backend +
            " backend",
        std::string("Make it with: ") + kMake + " " + facts.make + " --out " + folder.string());
  };
  Json manifest;
  if (whole) {
    manifest = read_record(manifest_path, "it", renew_);
    check_format(manifest, manifest_path, renew_);
    const Json::json_pointer place = "/stages"_json_pointer / facts.name;
    if (!manifest.contains(place) || !fs::is_directory(path_, ignored)) {
      throw missing();
    }
  } else if (!fs::is_regular_file(path_ / facts.file, ignored)) {
    throw missing();
  }
  const fs::path description_path = path_ / "model.json";
  const Json json = read_record(description_path, "it in a folder made by this version", renew_);
  check_format(json, description_path, renew_);
  const Field file(json, description_path.string(), kUnreadable);
  const Field stage = whole ? Field(manifest["stages"][facts.name],
                                    manifest_path.string() + ", stages, " + facts.name, kUnreadable)
                            : file;
  const Field files = need(stage, "files");
  if (!files.value().is_object()) files.refuse("an object");
  for (const auto& [name, value] : files.value().items()) {
    if (!is_name(name)) {
      throw Error(
          files.where(),
          "got a file called " + printable(name) + ", expected the name of a file in this folder",
          kUnreadable);
    }
    const Field record = need(files, name), sha256 = need(record, "sha256");
    if (!is_sha256(sha256.text())) sha256.refuse("64 hexadecimal digits");
    records_[name] = {bytes(need(record, "bytes")), sha256.text()};
  }
  if (whole) this->file("model.json", true);
  description_ = describe(file);
  if (whole) proof_ = read_proof(folder / "report" / "report.json");
}

bool Artifact::has(const fs::path& folder, Stage stage) {
  const StageFacts facts = facts_of(stage);
  std::error_code ignored;
  return fs::is_directory(folder / facts.name, ignored) || fs::exists(folder / facts.file, ignored);
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

Json Artifact::record(const std::string& name) const {
  return read_record(file(name, true), "it", renew_);
}

}  // namespace anybit
