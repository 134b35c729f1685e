// Opens an artifact: checks its files, chooses the backend and opens it.
#include "anybit/model.hpp"

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include <cstdio>
#include <limits>
#include <optional>

#include "artifact.hpp"
#include "onnxruntime/open.hpp"
#include "opened.hpp"
#include "parts.hpp"
#include "tensorrt/open.hpp"

namespace anybit {
namespace {

namespace fs = std::filesystem;

void check_options(const LoadOptions& options) {
  const auto check = [](const char* name, int64_t got, int64_t least, int64_t most,
                        const char* or_else = "") {
    if (got >= least && got <= most) return;
    throw Error(name,
                "got " + std::to_string(got) + ", expected " + or_else + std::to_string(least) +
                    " to " + std::to_string(most),
                "Give such a number");
  };
  check("slots", options.slots, 1, 1024);
  check("threads", options.threads, 0, 4096);
  if (options.capacity != 0) {  // a prompt has a token, and an answer
    check("capacity", options.capacity, 2, std::numeric_limits<int32_t>::max(), "0, or ");
  }
  check("chunk", options.chunk, 1, 65536);
  if (options.backend != "auto" && options.backend != "tensorrt" &&
      options.backend != "onnxruntime") {
    throw Error("backend",
                "got \"" + options.backend + "\", expected auto, tensorrt or onnxruntime",
                "Choose one of these");
  }
}

std::string megabytes(size_t bytes) {
  char text[32];
  snprintf(text, sizeof text, "%.1f MB", static_cast<double>(bytes) / 1e6);
  return text;
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

// A folder, and what runs it.
struct Source {
  Artifact artifact;
  Opened opened;
};

// Nothing where another backend may be taken, and then why this one cannot be.
std::optional<Source> open_engine(const fs::path& folder, const LoadOptions& options,
                                  std::optional<Error>& why) {
  try {
    Artifact artifact(folder, Stage::engine);
    trt::Ready ready = trt::find(artifact, options);
    Opened opened = trt::open(artifact, std::move(ready), options);
    return Source{std::move(artifact), std::move(opened)};
  } catch (const NoStage& error) {
    why = error;
  } catch (const trt::Unfit& error) {
    why = error;
  }
  if (options.backend == "tensorrt") throw *why;
  return {};
}

Source open_graph(const fs::path& folder, const LoadOptions& options) {
  Artifact artifact(folder, Stage::onnx);
  Opened opened = ort::open(artifact, options);
  return {std::move(artifact), std::move(opened)};
}

Source open_either(const fs::path& folder, const LoadOptions& options, std::string& choice) {
  if (options.backend == "onnxruntime") return open_graph(folder, options);
  if (options.backend == "auto" && !Artifact::has(folder, Stage::engine)) {
    choice = folder.string() + ": got no engine folder";
    return open_graph(folder, options);
  }
  std::optional<Error> why;
  std::optional<Source> source = open_engine(folder, options, why);
  if (source) {
    if (options.backend == "auto") choice = "the engine fits this machine";
    return std::move(*source);
  }
  try {
    choice = why->where() + ": " + why->problem();
    return open_graph(folder, options);
  } catch (const NoStage&) {
    throw *why;  // there is nothing but the engine
  }
}

}  // namespace

std::string MemoryPlan::text() const {
  return "cache " + megabytes(cache) + ", its copy " + megabytes(second_cache) + ", logits " +
         megabytes(logits) + ", activations about " + megabytes(activations) +
         (on_gpu ? ", CUDA graphs " + megabytes(graphs) + "; weights " + megabytes(weights) +
                       ", all on the GPU"
                 : ", float weights in fp32 " + megabytes(copies) + ", the program about " +
                       megabytes(program) + "; weights " + megabytes(weights) + " mapped");
}

void check_plan(const MemoryPlan& plan, const LoadOptions& options) {
  if (plan.total() <= plan.limit) return;
  const std::string problem = "got " + megabytes(plan.limit) + ", expected " +
                              megabytes(plan.total()) + " (" + plan.text() + ")";
  const char* fix = "Load with fewer slots, a smaller capacity or a smaller chunk";
  if (options.memory_limit > 0) throw Error("memory", problem, fix);
  throw Unavailable("memory", problem, fix);
}

Model::Model(std::unique_ptr<Parts> parts) : parts_(std::move(parts)) {}
Model::~Model() = default;
const Card& Model::card() const { return parts_->card; }
const Tokenizer& Model::tokenizer() const { return parts_->tokenizer.get(); }
const ChatTemplate& Model::chat() const { return parts_->chat.get(); }

std::shared_ptr<Model> Model::load(const fs::path& folder, const LoadOptions& options) {
  check_options(options);
  std::string choice;
  Source source = open_either(folder, options, choice);
  auto parts = std::make_unique<Parts>();
  Opened& opened = source.opened;
  const Artifact& artifact = source.artifact;
  const Description& about = artifact.description();
  Card& card = parts->card;
  card.max_context = opened.max_context;
  card.memory = opened.memory;
  card.threads = opened.threads;
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
  card.backend = opened.name;
  card.choice = choice;
  card.cache_form = about.cache.form;
  card.slots = options.slots;
  card.verified = options.verify;
  card.proof = artifact.proof();
  parts->chunk = opened.chunk;
  parts->token_bytes = opened.token_bytes;
  parts->tokenizer =
      maybe<Tokenizer>([&] { return Tokenizer::load(artifact.file("tokenizer.json", true)); });
  parts->chat =
      maybe<ChatTemplate>([&] { return ChatTemplate::load(artifact.file("chat.json", true)); });
  parts->backend = std::move(opened.backend);
#ifdef __GLIBC__
  malloc_trim(0);  // what reading the files took goes back to the system
#endif
  return std::make_shared<Model>(std::move(parts));
}

}  // namespace anybit
