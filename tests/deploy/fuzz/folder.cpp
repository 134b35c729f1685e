// Files of an artifact, of which somebody may have changed one.
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "anybit/error.hpp"
#include "artifact.hpp"
#include "fuzz.hpp"
#include "onnxruntime/graph.hpp"
#include "sha256.hpp"
#include "tensorrt/open.hpp"

namespace anybit::fuzz {
namespace {

namespace fs = std::filesystem;

// model.json, but for its files.
const std::string kAbout =
    R"("format": 1, "model": "m", "family": "llama", "scheme": "w4a8", "method": "rtn",
"dtype": "float16", "sizes": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
"vocab_size": 512}, "context": 128, "max_context": 128, "eos_token_ids": [2],
"cache": {"layers": 2, "bits": 16, "form": "static", "capacity": 128})";

// In memory where the system has such a folder, as each input is a file there.
struct Place {
  fs::path path;
  Place() {
    std::error_code ignored;
    const fs::path memory = "/dev/shm";
    std::string name = ((fs::is_directory(memory, ignored) ? memory : fs::temp_directory_path()) /
                        "anybit-fuzz-XXXXXX")
                           .string();
    if (!mkdtemp(name.data())) std::abort();
    path = name;
    fs::create_directories(path / "out" / "onnx");
    fs::create_directories(path / "engine");
    setenv("ANYBIT_CUDA", (path / "no driver").c_str(), 1);
  }
  ~Place() {
    std::error_code ignored;
    fs::remove_all(path, ignored);
  }
};

void write(const fs::path& path, std::string_view text) {
  std::ofstream(path, std::ios::binary).write(text.data(), static_cast<ptrdiff_t>(text.size()));
}

// What model.json says of a file.
std::string record(const fs::path& path) {
  return "\"" + path.filename().string() +
         "\": {\"bytes\": " + std::to_string(fs::file_size(path)) + ", \"sha256\": \"" +
         sha256_file(path) + "\"}";
}

std::string model_json(const std::string& files) {
  return "{" + kAbout + ", \"files\": {" + files + "}}";
}

// The record of a good model.json in the place of @, as no change could make it fit.
std::string with_record(std::string_view input, const std::string& record) {
  std::string text(input);
  if (const size_t at = text.find('@'); at != text.npos) text.replace(at, 1, record);
  return text;
}

}  // namespace

// The first byte says which file the others are.
bool folder(std::string_view input) {
  static const Place place;
  if (input.empty()) return false;
  const char which = input[0];
  input.remove_prefix(1);
  const fs::path out = place.path / "out", engine = place.path / "engine", onnx = out / "onnx";
  try {
    switch (which) {
      case 'm':  // manifest.json
        write(onnx / "model.json", model_json(""));
        write(out / "manifest.json", with_record(input, record(onnx / "model.json")));
        Artifact(out, Stage::onnx);
        return true;
      case 'd':  // model.json
        write(onnx / "model.onnx", "");
        write(onnx / "model.json", input);
        Artifact(onnx, Stage::onnx);
        return true;
      case 'e':  // engine.json
        write(engine / "model.engine", "");
        write(engine / "engine.json", input);
        write(engine / "model.json", model_json(record(engine / "engine.json")));
        trt::find(Artifact(engine, Stage::engine), {});
        return true;
      case 'g': {  // model.onnx
        write(onnx / "model.onnx", input);
        write(onnx / "model.json", model_json(record(onnx / "model.onnx")));
        const Artifact artifact(onnx, Stage::onnx);
        const ort::Graph graph = ort::read_graph(artifact.file("model.onnx", true));
        cache_form(graph.inputs, graph.outputs, artifact.description(), "model.onnx", "Make it");
        return true;
      }
      default: return false;
    }
  } catch (const trt::Unfit&) {  // the file is good, and there is no GPU
    return true;
  } catch (const Error&) {
    return false;
  }
}

}  // namespace anybit::fuzz
