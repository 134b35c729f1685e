// Opens an artifact: checks its files, plans the memory, opens the backend.
#include "anybit/model.hpp"

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include <cstdio>
#include <cstdlib>
#include <limits>

#include "artifact.hpp"
#include "library.hpp"
#include "machine.hpp"
#include "onnxruntime/decoder.hpp"
#include "parts.hpp"

namespace anybit {
namespace {

namespace fs = std::filesystem;

const char* const kOnnxRuntime = "libonnxruntime.so";
const char* const kKernels = "libanybit_onnxruntime.so";
// What ONNX Runtime and its graph take, and what the tokenizer takes for each byte of its file, as
// measured with models of 2 and of 30 layers.
constexpr size_t kProgram = 45'000'000, kTokenizer = 8;

void check_options(const LoadOptions& options) {
  const auto check = [](const char* name, int64_t got, int64_t least, int64_t most) {
    if (got >= least && got <= most) return;
    throw Error(name,
                "got " + std::to_string(got) + ", expected " + std::to_string(least) + " to " +
                    std::to_string(most),
                "Give such a number");
  };
  check("slots", options.slots, 1, 1024);
  check("threads", options.threads, 0, 4096);
  check("capacity", options.capacity, 0, std::numeric_limits<int32_t>::max());
  check("chunk", options.chunk, 1, 65536);
  if (options.backend != "auto" && options.backend != "onnxruntime") {
    throw Error("backend", "got \"" + options.backend + "\", expected auto or onnxruntime",
                options.backend == "tensorrt"
                    ? "TensorRT engines run with python -m deploy; this library runs the ONNX file"
                    : "Choose one of these");
  }
}

// Where pip and the system put it, those of this program's own environment first.
std::vector<fs::path> onnxruntime_folders() {
  std::vector<fs::path> folders{own_folder()};
  std::vector<fs::path> prefixes;
  for (const char* variable : {"VIRTUAL_ENV", "CONDA_PREFIX"}) {
    if (const char* value = std::getenv(variable); value && *value) prefixes.emplace_back(value);
  }
  prefixes.insert(prefixes.end(), {own_folder().parent_path() / ".venv", "/usr/local", "/usr"});
  if (const char* home = std::getenv("HOME")) prefixes.push_back(fs::path(home) / ".local");
  for (const fs::path& prefix : prefixes) {
    for (const fs::path& python : entries(prefix / "lib")) {
      for (const char* packages : {"site-packages", "dist-packages"}) {
        folders.push_back(python / packages / "onnxruntime" / "capi");
      }
    }
  }
  return folders;
}

fs::path find_onnxruntime(const LoadOptions& options) {
  const fs::path found = find_library(options.onnxruntime, "onnxruntime", "ANYBIT_ONNXRUNTIME",
                                      kOnnxRuntime, onnxruntime_folders());
  return found.empty() ? fs::path(kOnnxRuntime) : found;  // the linker may know one
}

// Empty: the bodies are to run.
fs::path find_kernels(const LoadOptions& options) {
  if (options.kernels == "none") return "";
  const fs::path own = own_folder();
  const fs::path found =
      find_library(options.kernels, "kernels", "ANYBIT_KERNELS", kKernels,
                   {own, own.parent_path() / "lib", own.parent_path() / "build"});
  if (!found.empty()) return found;
  throw Error("kernels", std::string("got no ") + kKernels + ", expected it in " + own.string(),
              "Build it with python -m plugins build, and name it in the options or in "
              "ANYBIT_KERNELS; \"none\" runs the model without it, slowly");
}

// What the tensors of the largest call take, where each lives until its last use: the residual
// stream, a GEMM's input and output, and the scores of a concatenated cache's attention.
size_t estimate_activations(const Description& about, size_t tokens, size_t scores) {
  const size_t stream = static_cast<size_t>(about.hidden), heads = static_cast<size_t>(about.heads);
  const size_t wide = static_cast<size_t>(about.intermediate);
  return tokens * sizeof(float) * (4 * stream + 4 * wide + heads * scores);
}

std::string megabytes(size_t bytes) {
  char text[32];
  snprintf(text, sizeof text, "%.1f MB", static_cast<double>(bytes) / 1e6);
  return text;
}

MemoryPlan plan_memory(const Artifact& artifact, const ort::CacheForm& form,
                       const LoadOptions& options, int max_context, size_t copied) {
  const Description& about = artifact.description();
  const auto slots = static_cast<size_t>(options.slots), chunk = static_cast<size_t>(options.chunk);
  const auto context = static_cast<size_t>(max_context);
  MemoryPlan plan;
  plan.weights = artifact.size_of("model.onnx.data");
  plan.copies = copied;
  plan.program = kProgram;
  std::error_code missing;
  if (const auto bytes = fs::file_size(artifact.path() / "tokenizer.json", missing); !missing) {
    plan.program += kTokenizer * bytes;
  }
  const size_t kept = form.is_static ? static_cast<size_t>(form.capacity) : context;
  plan.cache = slots * kept * form.token_bytes;
  plan.second_cache = form.is_static ? 0 : context * form.token_bytes;
  const size_t rows = form.is_static ? slots : 1;
  const size_t logits = std::max(rows, form.picks_logits ? size_t{1} : chunk);
  plan.logits = logits * static_cast<size_t>(about.vocab) * sizeof(float);
  plan.activations =
      estimate_activations(about, std::max(chunk, rows), form.is_static ? 0 : context);
  plan.limit = options.memory_limit > 0 ? options.memory_limit : free_memory();
  if (plan.total() > plan.limit) {
    const std::string problem = "got " + megabytes(plan.limit) + ", expected " +
                                megabytes(plan.total()) + " (" + plan.text() + ")";
    const char* fix = "Load with fewer slots, a smaller capacity or a smaller chunk";
    if (options.memory_limit > 0) throw Error("memory", problem, fix);
    throw Unavailable("memory", problem, fix);
  }
  return plan;
}

template <class T, class Load>
Maybe<T> maybe(Load load) {
  Maybe<T> part;
  try {
    part.value.emplace(load());
  } catch (const Error& error) {
    part.error.emplace(error);
  }
  return part;
}

}  // namespace

std::string MemoryPlan::text() const {
  return "cache " + megabytes(cache) + ", its copy " + megabytes(second_cache) + ", logits " +
         megabytes(logits) + ", activations about " + megabytes(activations) +
         ", float weights in fp32 " + megabytes(copies) + ", the program about " +
         megabytes(program) + "; weights " + megabytes(weights) + " mapped";
}

Model::Model(std::unique_ptr<Parts> parts) : parts_(std::move(parts)) {}
Model::~Model() = default;
const Card& Model::card() const { return parts_->card; }
const Tokenizer& Model::tokenizer() const { return parts_->tokenizer.get(); }
const ChatTemplate& Model::chat() const { return parts_->chat.get(); }

std::shared_ptr<Model> Model::load(const fs::path& folder, const LoadOptions& options) {
  check_options(options);
  const Artifact artifact(folder);
  const Description& about = artifact.description();
  const fs::path file = artifact.file("model.onnx", true);
  artifact.file("model.onnx.data", options.verify);
  if (about.dtype == "bfloat16") {
    throw Error(
        file.string(),
        "got a model in bfloat16, expected float16 or float32: ONNX Runtime has no bfloat16 "
        "on a CPU",
        "Export with --dtype float16 or float32");
  }
  const fs::path kernels = find_kernels(options);
  const ort::Graph graph = ort::read_graph(file);
  const ort::CacheForm form = ort::cache_form(graph, artifact);
  if (form.is_static && kernels.empty()) {
    throw Error("kernels", "got none, expected them for a static cache, which they write in place",
                "Leave the option out, or export with --kv concat");
  }
  auto parts = std::make_unique<Parts>();
  Card& card = parts->card;
  card.max_context =
      form.is_static ? std::min(about.max_context, form.capacity) : about.max_context;
  if (options.capacity > 0) card.max_context = std::min(card.max_context, options.capacity);
  card.memory = plan_memory(artifact, form, options, card.max_context, graph.copied);
  card.threads = options.threads > 0 ? options.threads : usable_cores();
  auto session = std::make_unique<ort::Session>(find_onnxruntime(options), file,
                                                ort::Session::Options{card.threads, kernels});
  card.name = about.model;
  card.family = about.family;
  card.scheme = about.scheme;
  card.method = about.method;
  card.dtype = about.dtype;
  card.kv_bits = about.cache.bits;
  card.layers = about.cache.layers;
  card.hidden = about.hidden;
  card.vocab = about.vocab;
  card.context = about.context;
  card.end_tokens = about.end_tokens;
  card.sampling = about.sampling;
  card.backend = "ONNX Runtime " + session->api().version() +
                 (kernels.empty() ? ", function bodies" : ", native kernels");
  card.cache_form = about.cache.form;
  card.slots = options.slots;
  card.verified = options.verify;
  card.proof = artifact.proof();
  parts->chunk = options.chunk;
  parts->token_bytes = form.token_bytes;
  parts->tokenizer =
      maybe<Tokenizer>([&] { return Tokenizer::load(artifact.file("tokenizer.json", true)); });
  parts->chat =
      maybe<ChatTemplate>([&] { return ChatTemplate::load(artifact.file("chat.json", true)); });
  parts->backend = ort::make_backend(std::move(session), graph, form, options.slots, about.vocab);
#ifdef __GLIBC__
  malloc_trim(0);  // what reading the files took goes back to the system
#endif
  return std::make_shared<Model>(std::move(parts));
}

}  // namespace anybit
