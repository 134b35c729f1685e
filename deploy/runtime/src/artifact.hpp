// Reads the folder of an exported model: what model.json says, and that the files are what was
// written.
#pragma once
#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

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

class Artifact {
 public:
  // folder: OUT of python -m exporter, or its onnx folder alone.
  //
  // Throws Error: there is no exported model, or its records are missing, damaged or of another
  // format.
  explicit Artifact(const std::filesystem::path& folder);

  const std::filesystem::path& path() const { return path_; }  // of the onnx folder
  const Description& description() const { return description_; }
  const std::string& proof() const { return proof_; }  // as Card::proof

  // The path of a file that has its recorded size and, where `hash`, its recorded SHA-256.
  //
  // Throws Error: it is missing, truncated or changed, or has no record.
  std::filesystem::path file(const std::string& name, bool hash) const;

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
