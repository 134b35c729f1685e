// Checks an engine against the machine, plans the GPU's memory, and opens the engine.
#include "tensorrt/open.hpp"

#include <algorithm>
#include <cstdlib>
#include <nlohmann/json.hpp>

#include "anybit/error.hpp"
#include "json.hpp"
#include "library.hpp"
#include "tensorrt/decoder.hpp"

namespace anybit::trt {
namespace {

namespace fs = std::filesystem;

const char* const kRecord = "engine.json";
const char* const kEngine = "model.engine";
const std::string kAgain = "Build the engine again";
const std::string kHere = "Build the engine again on this machine";

// What engine.json says that running needs.
struct EngineRecord {
  const Edition* edition = nullptr;
  std::string version, plugins;
  std::vector<std::string> capabilities, ops;
};

EngineRecord read_engine(const Artifact& artifact) {
  const std::string where = (artifact.path() / kRecord).string();
  const nlohmann::json json = artifact.record(kRecord);
  const Field file(json, where, kAgain);
  EngineRecord made;
  made.edition = &find_edition(file.at("edition").text(), where + ", edition", kAgain);
  made.version = file.at("version").text();
  made.plugins = file.at("plugin_library").at("name").text();
  const Field capabilities = file.at("compute_capabilities");
  for (size_t i = 0; i < capabilities.items(); ++i) {
    made.capabilities.push_back(capabilities.at(i).text());
  }
  made.ops = file.at("custom_nodes").names();
  return made;
}

std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

std::unique_ptr<Api> find_api(const EngineRecord& record, const LoadOptions& options) {
  const Edition& edition = *record.edition;
  const std::string major = record.version.substr(0, record.version.find('.'));
  const std::string name = std::string(edition.library) + "." + major;
  const fs::path found = find_library(options.tensorrt, "tensorrt", "ANYBIT_TENSORRT", name,
                                      package_folders(edition.package));
  auto api = std::make_unique<Api>(found.empty() ? fs::path(name) : found, edition);
  if (api->version() == record.version) return api;
  throw Error(api->edition().title,
              "got version " + api->version() + ", expected " + printable(record.version) +
                  ", which built the engine",
              std::string("Install that version, or build the engine again with this one"));
}

MemoryPlan plan_memory(const Artifact& artifact, const CacheForm& form, const Sizes& sizes,
                       const LoadOptions& options, size_t free) {
  const auto slots = static_cast<size_t>(sizes.slots);
  MemoryPlan plan;
  plan.on_gpu = true;
  plan.weights = artifact.size_of(kEngine);
  for (const CacheTensor& tensor : form.tensors) {
    const size_t slot = aligned(tensor.bytes(form.is_static ? form.capacity : sizes.context));
    plan.cache += slots * slot;
    if (!form.is_static) plan.second_cache += slot;
  }
  plan.logits = static_cast<size_t>(sizes.rows) * static_cast<size_t>(sizes.vocab) * sizeof(float);
  plan.activations = sizes.working;
  plan.limit = options.memory_limit > 0 ? options.memory_limit : free;
  return plan;
}

bool wants_graphs(const LoadOptions& options) {
  return options.cuda_graphs && environment("ANYBIT_CUDA_GRAPHS") != "0";
}

}  // namespace

Ready find(const Artifact& artifact, const LoadOptions& options) {
  const EngineRecord record = read_engine(artifact);
  try {
    Ready ready;
    ready.driver = std::make_unique<cuda::Driver>(environment("ANYBIT_CUDA"));
    const std::string& here = ready.driver->capability();
    const auto& made_for = record.capabilities;
    if (!made_for.empty() && std::find(made_for.begin(), made_for.end(), here) == made_for.end()) {
      std::string listed;
      for (const std::string& one : made_for) listed += (listed.empty() ? "" : ", ") + one;
      throw Error((artifact.path() / kEngine).string(),
                  "got an engine for compute capability " + printable(listed) + ", expected " +
                      here + " of " + ready.driver->name(),
                  kHere);
    }
    ready.api = find_api(record, options);
    return ready;
  } catch (const Error& error) {
    throw Unfit(error);
  }
}

Opened open(const Artifact& artifact, Ready ready, const LoadOptions& options) {
  const EngineRecord record = read_engine(artifact);
  const Description& about = artifact.description();
  const fs::path file = artifact.file(kEngine, options.verify);
  const fs::path plugins = artifact.file(record.plugins, true);
  const cuda::KeptContext kept(*ready.driver);
  ready.driver->use();
  ready.api->load_plugins(plugins, record.ops);
  auto engine = std::make_unique<Engine>(*ready.api, file);
  const CacheForm form =
      cache_form(engine->inputs(), engine->outputs(), about, file.string(), kAgain);
  if (!form.picks_logits) {
    throw Error(file.string(), "got an engine without logits_indices, expected it",
                "Export the model again");
  }
  const auto most = [&](Profile profile, size_t dimension) {
    const int64_t most = engine->most("input_ids", profile, dimension);
    return static_cast<int>(std::min<int64_t>(most, INT32_MAX));
  };
  Sizes sizes;
  sizes.slots = options.slots;
  sizes.context = form.is_static ? std::min(about.max_context, form.capacity) : about.max_context;
  if (options.capacity > 0) sizes.context = std::min(sizes.context, options.capacity);
  sizes.chunk = std::min(options.chunk, most(Profile::kPrefill, 1));
  sizes.vocab = about.vocab;
  // Rows of a call lie behind each other, and each has to begin where TensorRT wants memory to.
  bool together = form.is_static;
  for (const CacheTensor& tensor : form.tensors) {
    const size_t bytes = tensor.bytes(form.capacity);
    together = together && aligned(bytes) == bytes;
  }
  sizes.rows = together ? std::min(options.slots, most(Profile::kDecode, 0)) : 1;
  sizes.working = std::max(engine->memory(Profile::kPrefill), engine->memory(Profile::kDecode));

  Opened made;
  made.max_context = sizes.context;
  made.chunk = sizes.chunk;
  made.token_bytes = form.token_bytes;
  made.memory = plan_memory(artifact, form, sizes, options, ready.driver->free_memory());
  check_plan(made.memory, options);
  sizes.graphs = made.memory.limit - made.memory.total();
  made.name = std::string(ready.api->edition().title) + " " + ready.api->version() + " on " +
              ready.driver->name();
  Running running = make_backend(std::move(ready.driver), std::move(ready.api), std::move(engine),
                                 form, sizes, wants_graphs(options));
  made.backend = std::move(running.backend);
  made.memory.graphs = running.graphs;
  made.name +=
      running.no_graphs.empty() ? ", CUDA graphs" : ", no CUDA graphs (" + running.no_graphs + ")";
  return made;
}

}  // namespace anybit::trt
