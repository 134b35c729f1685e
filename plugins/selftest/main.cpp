// anybit-selftest: every op of a library, in every bit pair, kernel and edge shape, against a
// plain CPU computation, on this machine's GPU.
//
// kHelp below says how to call it.
#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <set>
#include <stdexcept>

#include "core/host/config.h"
#include "selftest/device.h"
#include "selftest/layer.h"
#include "selftest/numbers.h"

namespace selftest {
namespace {

constexpr unsigned char kPoison = 0xcb;
constexpr size_t kGuard = 256;
constexpr int kMostTactics = 64, kMostLines = 20;
const char* const kBuild = "Build it: python -m plugins build";

// The names of the ops that the self-test knows.
std::string op_names(const char* between) {
  std::string names;
  for (const Oracle* oracle : oracles())
    names += (names.empty() ? "" : between) + std::string(oracle->op);
  return names;
}
std::string usage() {
  return "Use: anybit-selftest LIBRARY [--quick] [--op " + op_names("|") +
         "] [--kernel NAME] [--seed N] [--list] [--help]";
}
const char* const kHelp = R"(
LIBRARY is libanybit_plugins.so for the GPU (CUDA_VISIBLE_DEVICES picks it),
libanybit_onnxruntime.so for this CPU, with each of its instruction sets, or
libanybit_kernels_sim.so for the simulation of a GPU.
  --quick        fewer sizes
  --op           only this op
  --kernel NAME  only this kernel, such as "int8 64x8"
  --seed N       of the random layers (1)
  --list         print the cases, run nothing
Exit code 0: all right; 3: a mismatch; 2: bad arguments, or no GPU that can run the kernels;
1: anything else.
)";

struct Options {
  std::string library, op, kernel;
  bool quick = false, list = false, help = false;
  unsigned seed = 1;
};

// An op of the loaded library, and what it must compute.
struct Op {
  AnybitOp kernels;
  const Oracle* oracle;

  const char* name() const { return kernels.name; }
};

struct Tally {
  int shapes = 0, calls = 0, failed = 0;
  double worst = 0;
};

// The library's ops; each must have an oracle, and each oracle its op.
std::vector<Op> load_ops(void* library) {
  const auto table = reinterpret_cast<int (*)(const AnybitOp**)>(dlsym(library, "anybit_ops"));
  const AnybitOp* ops = nullptr;
  const int count = table ? table(&ops) : 0;
  std::string names;
  std::vector<Op> found;
  for (int i = 0; i < count; ++i) {
    names += (names.empty() ? "" : ", ") + std::string(ops[i].name);
    for (const Oracle* oracle : oracles())
      if (std::strcmp(oracle->op, ops[i].name) == 0) found.push_back({ops[i], oracle});
  }
  if (count == 0 || found.size() != size_t(count) || found.size() != oracles().size())
    throw std::invalid_argument("LIBRARY: got one with " + (count ? names : "no ops") +
                                ", expected a kernel library of this version, with " +
                                op_names(", ") + ". " + kBuild);
  return found;
}

// A buffer of the device with guard zones around it.
class Buffer {
 public:
  Buffer(Device& device, const void* content, size_t bytes)
      : device_(device), bytes_(bytes), host_(bytes + 2 * kGuard, kPoison) {
    if (content && bytes) std::memcpy(&host_[kGuard], content, bytes);
    memory_ = static_cast<char*>(device.allocate(host_.size()));
    device.upload(memory_, host_.data(), host_.size());
  }
  ~Buffer() { device_.release(memory_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void* data() { return memory_ + kGuard; }
  std::vector<uint8_t> fetch() {
    device_.download(host_.data(), memory_, host_.size());
    return {host_.begin() + kGuard, host_.begin() + long(kGuard + bytes_)};
  }
  bool unchanged() const {
    std::vector<uint8_t> now(host_.size());
    device_.download(now.data(), memory_, now.size());
    return now == host_;
  }
  bool guards_hold() const {  // after fetch()
    for (size_t i = 0; i < kGuard; ++i)
      if (host_[i] != kPoison || host_[kGuard + bytes_ + i] != kPoison) return false;
    return true;
  }

 private:
  Device& device_;
  size_t bytes_;
  std::vector<uint8_t> host_;
  char* memory_;
};

// The inputs of a case on the device, shared by all its calls.
class Inputs {
 public:
  Inputs(Device& device, const Layer& layer) {
    buffers_.x = put(device, layer.x.data(), layer.x.size());
    buffers_.weight = static_cast<const int32_t*>(
        put(device, layer.weights.packed.data(), layer.weights.packed.size() * 4));
    buffers_.scale = static_cast<const float*>(
        put(device, layer.weights.scale.data(), layer.weights.scale.size() * 4));
    if (!layer.weights.zero.empty())
      buffers_.zero = static_cast<const int32_t*>(
          put(device, layer.weights.zero.data(), layer.weights.zero.size() * 4));
    if (!layer.weights.minimum.empty())
      buffers_.minimum = static_cast<const float*>(
          put(device, layer.weights.minimum.data(), layer.weights.minimum.size() * 4));
    if (!layer.weights.scale_group.empty())
      buffers_.scale_group =
          put(device, layer.weights.scale_group.data(), layer.weights.scale_group.size() * 2);
    if (!layer.gamma.empty()) buffers_.gamma = put(device, layer.gamma.data(), layer.gamma.size());
    if (!layer.bias.empty())
      buffers_.bias =
          static_cast<const float*>(put(device, layer.bias.data(), layer.bias.size() * 4));
  }
  const GemmBuffers& buffers() const { return buffers_; }
  bool unchanged() const {
    return std::all_of(kept_.begin(), kept_.end(),
                       [](const auto& buffer) { return buffer->unchanged(); });
  }

 private:
  const void* put(Device& device, const void* content, size_t bytes) {
    kept_.push_back(std::make_unique<Buffer>(device, content, bytes));
    return kept_.back()->data();
  }
  std::vector<std::unique_ptr<Buffer>> kept_;
  GemmBuffers buffers_ = {};
};

// Output and workspace of one call, poisoned.
struct Target {
  Buffer y, workspace;
  Target(Device& device, const Case& c, size_t workspace_bytes)
      : y(device, nullptr, size_t(c.m) * c.n * size_of(c.dtype)),
        workspace(device, nullptr, workspace_bytes) {}
};

// Where y is farthest from what it must be, over what is allowed: up to 1 is right, infinite where
// one is NaN and the other not.
struct Distance {
  double over = 0;
  size_t at = 0;
};

Distance distance(const std::vector<uint8_t>& y, const Layer& layer, const Case& c, bool exact) {
  Distance worst;
  for (size_t i = 0; i < layer.want.size(); ++i) {
    const float got = load(y, i, c.dtype), want = layer.want[i];
    if (got == want || (std::isnan(got) && std::isnan(want))) continue;
    const double allowed = exact ? 0 : 1e-5 * layer.size[i] + epsilon_of(c.dtype) * std::fabs(want);
    const double over = allowed > 0 && !std::isnan(got) && !std::isnan(want)
                            ? std::fabs(double(got) - want) / allowed
                            : INFINITY;
    if (over > worst.over) worst = {over, i};
  }
  return worst;
}

class SelfTest {
 public:
  SelfTest(const Options& options, Device& device) : options_(options), device_(device) {}

  // Returns whether the device still works.
  bool run(const Op& op, const Case& c) {
    std::string kernel = "?";
    try {
      run_tactics(op, c, kernel);
    } catch (const std::runtime_error& error) {
      // After an illegal access, say, every later call fails too.
      fail(op, kernel, c,
           std::string("got ") + error.what() +
               ", expected success; the cases after it were not run");
      return false;
    }
    return true;
  }

  int report() const {
    int failed = 0, calls = 0;
    for (const auto& [key, tally] : tallies_) failed += tally.failed, calls += tally.calls;
    if (!calls && !failed) {
      std::string known;
      for (const std::string& kernel : kernels_) known += (known.empty() ? "" : ", ") + kernel;
      throw std::invalid_argument("--kernel: got " + options_.kernel +
                                  ", expected one that runs here: " + known + ". " + usage());
    }
    if (failed > kMostLines) std::printf("(%d failures more)\n", failed - kMostLines);
    std::printf("\n%-8s %-12s %7s %7s %7s  %s\n", "op", "kernel", "shapes", "calls", "failed",
                "worst (of what is allowed)");
    for (const auto& [key, tally] : tallies_)
      std::printf("%-8s %-12s %7d %7d %7d  %.2f\n", key.first.c_str(), key.second.c_str(),
                  tally.shapes, tally.calls, tally.failed, tally.worst);
    const std::string verdict =
        failed ? std::to_string(failed) +
                     " MISMATCHES; do not use these kernels here, report the lines above"
               : std::string("all right");
    std::printf("%s: %d calls, %s\n", device_.name().c_str(), calls, verdict.c_str());
    return failed ? 3 : 0;
  }

 private:
  void fail(const Op& op, const std::string& kernel, const Case& c, const std::string& problem) {
    ++tallies_[{op.name(), kernel}].failed;
    if (lines_++ < kMostLines)
      std::printf("%s %s %s: %s\n", op.name(), kernel.c_str(), text_of(c).c_str(), problem.c_str());
  }

  // Every kernel that can run the case, on whole and on shared K; `kernel` is the one at work.
  void run_tactics(const Op& op, const Case& c, std::string& kernel) {
    GemmShape shape = shape_of(c);
    int32_t tactics[kMostTactics];
    const int count = op.kernels.tactics(&shape, tactics, kMostTactics);
    if (!count) return fail(op, kernel, c, "got no tactic, expected at least the simple kernel");
    const Layer layer(*op.oracle, c, options_.seed);
    const Inputs inputs(device_, layer);
    for (int i = 0; i < count && i < kMostTactics; ++i) {
      kernel = op.kernels.kernel(tactics[i]);
      kernels_.insert(kernel);
      if (!options_.kernel.empty() && options_.kernel != kernel) continue;
      ++tallies_[{op.name(), kernel}].shapes;
      const anybit::Config config = anybit::config_from_tactic(tactics[i]);
      for (int shares = config.shares;; shares = 1) {
        shape.tactic = anybit::tactic_from_config({config.kernel, shares});
        check_call(op, kernel, shape, c, layer, inputs.buffers());
        if (shares == 1) break;
      }
      if (!inputs.unchanged())
        fail(op, kernel, c, "got inputs that changed, expected them as they were");
    }
  }

  // Alone, on two streams at once, and as a graph.
  void check_call(const Op& op, const std::string& kernel, const GemmShape& shape, const Case& c,
                  const Layer& layer, const GemmBuffers& in) {
    const size_t bytes = op.kernels.workspace(&shape);
    Target first(device_, c, bytes), second(device_, c, bytes), graph(device_, c, bytes);
    int status = 0;
    const auto call = [&](Target& target, void* stream) {
      GemmBuffers buffers = in;
      buffers.y = target.y.data(), buffers.workspace = target.workspace.data();
      const int code = op.kernels.run(&shape, &buffers, stream);
      if (code) status = code;
    };
    device_.run_on_two_streams([&](int i, void* stream) { call(i ? second : first, stream); });
    // an error would spoil the capture
    if (!status) device_.run_as_graph([&](void* stream) { call(graph, stream); });
    if (status)
      return fail(op, kernel, c, "got CUDA error " + std::to_string(status) + ", expected success");
    const bool exact = op.oracle->exact(c, anybit::config_from_tactic(shape.tactic).shares);
    Tally& tally = tallies_[{op.name(), kernel}];
    for (Target* target : {&first, &second, &graph}) {
      const std::vector<uint8_t> y = target->y.fetch();
      const Distance found = distance(y, layer, c, exact);
      target->workspace.fetch();
      ++tally.calls;
      tally.worst = std::max(tally.worst, found.over);
      const char* where = target == &first    ? ""
                          : target == &second ? " on a second stream"
                                              : " in a graph";
      if (!target->y.guards_hold() || !target->workspace.guards_hold())
        fail(op, kernel, c, std::string("got writes past the buffers") + where + ", expected none");
      else if (found.over > 1) fail(op, kernel, c, difference(found.at, y, layer, c) + where);
    }
  }

  static std::string difference(size_t i, const std::vector<uint8_t>& y, const Layer& layer,
                                const Case& c) {
    char text[128];
    std::snprintf(text, sizeof text, "got y[%zu, %zu] = %.9g, expected %.9g", i / c.n, i % c.n,
                  load(y, i, c.dtype), layer.want[i]);
    return text;
  }

  const Options& options_;
  Device& device_;
  std::map<std::pair<std::string, std::string>, Tally> tallies_;
  std::set<std::string> kernels_;  // of all cases
  int lines_ = 0;
};

unsigned number(const std::string& option, const std::string& text) {
  if (text.empty() || text.size() > 9 || text.find_first_not_of("0123456789") != std::string::npos)
    throw std::invalid_argument(option + ": got " + text +
                                ", expected a whole number of at most 9 digits. " + usage());
  return unsigned(std::stoul(text));
}

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    const auto value = [&] {
      if (i + 1 == argc)
        throw std::invalid_argument(word + ": got no value, expected one. " + usage());
      return std::string(argv[++i]);
    };
    if (word == "--quick") options.quick = true;
    else if (word == "--list") options.list = true;
    else if (word == "--help" || word == "-h") options.help = true;
    else if (word == "--op") options.op = value();
    else if (word == "--kernel") options.kernel = value();
    else if (word == "--seed") options.seed = number(word, value());
    else if (word[0] != '-' && options.library.empty()) options.library = word;
    else throw std::invalid_argument(word + ": got this argument, expected none such. " + usage());
  }
  const auto named = [&](const Oracle* oracle) { return options.op == oracle->op; };
  if (!options.op.empty() && std::none_of(oracles().begin(), oracles().end(), named))
    throw std::invalid_argument("--op: got " + options.op + ", expected " + op_names(" or ") +
                                ". " + usage());
  if (options.library.empty() && !options.help)
    throw std::invalid_argument("LIBRARY: got none, expected a kernel library. " + usage());
  return options;
}

int run(int argc, char** argv) {
  const Options options = parse(argc, argv);
  if (options.help) return std::printf("%s\n%s", usage().c_str(), kHelp), 0;
  void* library = dlopen(options.library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library)
    throw std::invalid_argument(std::string("LIBRARY: got ") + dlerror() +
                                ", expected a kernel library. " + kBuild);
  std::vector<std::pair<Op, Case>> list;
  for (const Op& op : load_ops(library)) {
    if (!options.op.empty() && options.op != op.name()) continue;
    for (const Case& c : op.oracle->cases(options.quick)) list.emplace_back(op, c);
  }
  if (options.list) {
    for (const auto& [op, c] : list) std::printf("%s %s\n", op.name(), text_of(c).c_str());
    return 0;
  }
  const auto set_order =
      reinterpret_cast<void (*)(unsigned)>(dlsym(library, "anybit_sim_set_seed"));
  std::unique_ptr<Device> device;
  try {
    if (set_order) {
      device = make_host("CPU simulation", set_order);
    } else if (dlsym(library, "RegisterCustomOps")) {
      device = make_host("CPU", [](unsigned) {});
    } else {
      device = make_gpu();
    }
  } catch (const std::runtime_error& error) {
    const std::string problem = std::string("GPU: got ") + error.what() +
                                ", expected one of compute capability 8.0 or later. ";
    throw std::invalid_argument(
        problem +
        "Without a GPU give the library of the CPU simulation (python -m plugins selftest --sim)");
  }
  SelfTest test(options, *device);
  for (const auto& [op, c] : list)
    if (!test.run(op, c)) break;
  return test.report();
}

}  // namespace
}  // namespace selftest

int main(int argc, char** argv) {
  try {
    return selftest::run(argc, argv);
  } catch (const std::invalid_argument& error) {
    std::fprintf(stderr, "%s.\n", error.what());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "anybit-selftest: got %s, expected none. Report it with the command.\n",
                 error.what());
    return 1;
  }
}
