// Finds ONNX Runtime and the native kernels, plans the memory, and opens the graph.
#include "onnxruntime/open.hpp"

#include "anybit/error.hpp"
#include "core/cpu/machine.h"
#include "library.hpp"
#include "onnxruntime/decoder.hpp"
#include "onnxruntime/graph.hpp"

namespace anybit::ort {
namespace {

namespace fs = std::filesystem;

const char* const kOnnxRuntime = "libonnxruntime.so";
const char* const kKernels = "libanybit_onnxruntime.so";
// What ONNX Runtime and its graph take, and what the tokenizer takes for each byte of its file, as
// measured with models of 2 and of 30 layers.
constexpr size_t kProgram = 60'000'000, kTokenizer = 8;

fs::path find_onnxruntime(const LoadOptions& options) {
  const fs::path found = find_library(options.onnxruntime, "onnxruntime", "ANYBIT_ONNXRUNTIME",
                                      kOnnxRuntime, package_folders("onnxruntime/capi"));
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

MemoryPlan plan_memory(const Artifact& artifact, const CacheForm& form, const LoadOptions& options,
                       int max_context, size_t copied) {
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
  plan.limit = options.memory_limit > 0 ? options.memory_limit : cpu::free_memory();
  check_plan(plan, options);
  return plan;
}

// ONNX Runtime has hardly any kernel of its own for bfloat16; ours compute all but a float head.
std::unique_ptr<Session> open_session(const fs::path& library, const fs::path& graph,
                                      const Session::Options& options, const std::string& dtype) {
  try {
    return std::make_unique<Session>(library, graph, options);
  } catch (const Error& error) {
    if (dtype != "bfloat16" || error.where() != graph.string()) throw;
    throw Error(error.where(),
                error.problem() +
                    "; got a model in bfloat16, expected its head quantized and the "
                    "native kernels",
                "Export with --head-bits 8, or with --dtype float16 or float32");
  }
}

}  // namespace

Opened open(const Artifact& artifact, const LoadOptions& options) {
  const Description& about = artifact.description();
  const fs::path file = artifact.file("model.onnx", true);
  artifact.file("model.onnx.data", options.verify);
  const fs::path kernels = find_kernels(options);
  const Graph graph = read_graph(file);
  const CacheForm form = cache_form(graph.inputs, graph.outputs, about, file.string(),
                                    "The file is damaged or changed: export the model again");
  if (form.is_static && kernels.empty()) {
    throw Error("kernels", "got none, expected them for a static cache, which they write in place",
                "Leave the option out, or export with --kv concat");
  }
  Opened made;
  made.max_context =
      form.is_static ? std::min(about.max_context, form.capacity) : about.max_context;
  if (options.capacity > 0) made.max_context = std::min(made.max_context, options.capacity);
  made.memory = plan_memory(artifact, form, options, made.max_context, graph.copied);
  made.threads = options.threads > 0 ? options.threads : cpu::usable_cores();
  std::unique_ptr<Session> session =
      open_session(find_onnxruntime(options), file, {made.threads, kernels}, about.dtype);
  made.name = "ONNX Runtime " + session->api().version() +
              (kernels.empty() ? ", function bodies" : ", native kernels");
  made.chunk = options.chunk;
  made.token_bytes = form.token_bytes;
  made.backend = make_backend(std::move(session), form, options.slots, about.vocab);
  return made;
}

}  // namespace anybit::ort
