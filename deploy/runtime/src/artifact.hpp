// Reads the folder of an exported model: what model.json says, and that the files are what was
// written.
#pragma once
#include <cstdint>
#include <filesystem>
#include <map>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "anybit/error.hpp"
#include "anybit/sampling.hpp"

namespace anybit {

// The fields of model.json that running needs; docs/onnx.md lists them.
struct Description {
  std::string model, family, scheme, method, dtype;
  int hidden = 0, intermediate = 0, heads = 0, vocab = 0, context = 0, max_context = 0;
  std::vector<int32_t> end_tokens;
  Sampling sampling;
  struct {
    int layers = 0, bits = 16;
    std::string form;  // "concat" or "static"
    int capacity = 0;  // of the static form
  } cache;
};

// A folder of an artifact that can be run alone.
enum class Stage { onnx, engine };

// The artifact lacks the stage's folder.
class NoStage : public Error {
 public:
  using Error::Error;
};

class Artifact {
 public:
  // folder: OUT of python -m exporter, or the stage's folder alone.
  //
  // Throws NoStage: there is no such folder. Throws Error: there is no artifact, or its records are
  // missing, damaged or of another format.
  explicit Artifact(const std::filesystem::path& folder, Stage stage = Stage::onnx);

  // Whether there is something that such a folder has; it may be damaged.
  static bool has(const std::filesystem::path& folder, Stage stage);

  const std::filesystem::path& path() const { return path_; }  // of the stage's folder
  const std::string& renew() const { return renew_; }          // how to make it again
  const Description& description() const { return description_; }
  const std::string& proof() const { return proof_; }  // as Card::proof

  // The path of a file that has its recorded size and, where `hash`, its recorded SHA-256.
  //
  // Throws Error: it is missing, truncated or changed, or has no record.
  std::filesystem::path file(const std::string& name, bool hash) const;

  // The object in a JSON file of the folder, which is hashed; `where` is the file.
  // Throws Error: as file(), or it is no JSON.
  nlohmann::json record(const std::string& name) const;

  // The recorded size of a file that file() has found.
  uint64_t size_of(const std::string& name) const { return records_.at(name).bytes; }

 private:
  struct Record {
    uint64_t bytes = 0;
    std::string sha256;
  };
  std::filesystem::path path_;
  std::string renew_;
  std::map<std::string, Record> records_;
  Description description_;
  std::string proof_ = "unknown";
};

}  // namespace anybit
