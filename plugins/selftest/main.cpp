// anybit-selftest: every op, bit pair, kernel and edge shape against a plain CPU computation, on this machine's GPU.
//
//   anybit-selftest LIBRARY [--quick] [--op ABQGemm|QQQGemm] [--kernel NAME] [--seed N] [--list]
//
// LIBRARY is libanybit_plugins.so, or libanybit_kernels_sim.so for the CPU simulation. Exit code 0: all equal; 3: a mismatch;
// 2: bad arguments, or nothing to run on.
#include <dlfcn.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <stdexcept>

#include "core/config.h"
#include "selftest/device.h"
#include "selftest/layer.h"

namespace selftest {
namespace {

constexpr unsigned char kPoison = 0xcb;
constexpr size_t kGuard = 256;
constexpr int kMostTactics = 64;
const char* const kBuild = "Build it: python -m plugins build";

struct Options {
  std::string library, op, kernel;
  bool quick = false, list = false;
  unsigned seed = 1;
};

// The C interface of one op in the loaded library.
struct Op {
  const char* name;
  size_t (*workspace)(const GemmShape*);
  int (*tactics)(const GemmShape*, int32_t*, int);
  const char* (*kernel)(int32_t);
  int (*run)(const GemmShape*, const GemmBuffers*, void*);
};

struct Tally {
  int shapes = 0, calls = 0, failed = 0;
  double worst = 0;
};

template <class F>
F* find(void* library, const std::string& function) {
  void* found = dlsym(library, function.c_str());
  const std::string problem = "LIBRARY: got one without " + function + ", expected a kernel library of this version. ";
  if (!found) throw std::invalid_argument(problem + kBuild);
  return reinterpret_cast<F*>(found);
}

Op load_op(void* library, const char* name, const std::string& prefix) {
  return {name, find<size_t(const GemmShape*)>(library, prefix + "_workspace"),
          find<int(const GemmShape*, int32_t*, int)>(library, prefix + "_tactics"),
          find<const char*(int32_t)>(library, prefix + "_kernel"),
          find<int(const GemmShape*, const GemmBuffers*, void*)>(library, prefix)};
}

// A buffer of the device with guard zones around it.
class Buffer {
 public:
  Buffer(Device& device, const void* content, size_t bytes) : device_(device), bytes_(bytes), host_(bytes + 2 * kGuard, kPoison) {
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
    buffers_.weight = static_cast<const int32_t*>(put(device, layer.weight.data(), layer.weight.size() * 4));
    buffers_.scale = static_cast<const float*>(put(device, layer.scale.data(), layer.scale.size() * 4));
    if (!layer.zero.empty()) buffers_.zero = static_cast<const int32_t*>(put(device, layer.zero.data(), layer.zero.size() * 4));
    if (!layer.scale_group.empty()) buffers_.scale_group = put(device, layer.scale_group.data(), layer.scale_group.size() * 2);
    if (!layer.bias.empty()) buffers_.bias = static_cast<const float*>(put(device, layer.bias.data(), layer.bias.size() * 4));
  }
  const GemmBuffers& buffers() const { return buffers_; }

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
      : y(device, nullptr, size_t(c.m) * c.n * (c.dtype == kFloat32 ? 4 : 2)), workspace(device, nullptr, workspace_bytes) {}
};

// The largest difference over what is allowed (at most 1 is right), infinite where one is NaN and the other not.
double distance(const std::vector<uint8_t>& y, const Layer& layer, const Case& c, bool reordered) {
  double worst = 0;
  for (size_t i = 0; i < layer.want.size(); ++i) {
    const float got = load(y, i, c.dtype), want = layer.want[i];
    if ((got != got) != (want != want)) return INFINITY;
    if (got != got || got == want) continue;
    const double allowed = reordered ? 1e-5 * layer.size[i] + epsilon_of(c.dtype) * std::fabs(want) : 0;
    worst = std::max(worst, allowed > 0 ? std::fabs(double(got) - want) / allowed : INFINITY);
  }
  return worst;
}

class SelfTest {
 public:
  SelfTest(const Options& options, Device& device, std::vector<Op> ops) : options_(options), device_(device), ops_(std::move(ops)) {}

  void run(const Case& c) {
    const Op& op = ops_[c.qqq];
    if (!options_.op.empty() && options_.op != op.name) return;
    GemmShape shape = shape_of(c);
    int32_t tactics[kMostTactics];
    const int count = op.tactics(&shape, tactics, kMostTactics);
    if (!count) return fail(op, "?", c, "got no tactic, expected at least the simple kernel");
    const Layer layer(c, options_.seed);
    const Inputs inputs(device_, layer);
    for (int i = 0; i < count && i < kMostTactics; ++i) {
      const std::string kernel = op.kernel(tactics[i]);
      if (!options_.kernel.empty() && options_.kernel != kernel) continue;
      ++tallies_[{op.name, kernel}].shapes;
      std::vector<int> shares = {anybit::config_from_tactic(tactics[i]).shares};
      if (shares[0] > 1) shares.push_back(1);  // K whole as well
      for (const int s : shares) {
        shape.tactic = anybit::tactic_from_config({anybit::config_from_tactic(tactics[i]).kernel, s});
        check_call(op, kernel, shape, c, layer, inputs.buffers());
      }
    }
  }

  int report() const {
    int failed = 0, calls = 0;
    std::printf("\n%-8s %-12s %7s %7s %7s  %s\n", "op", "kernel", "shapes", "calls", "failed", "worst (of what is allowed)");
    for (const auto& [key, tally] : tallies_) {
      std::printf("%-8s %-12s %7d %7d %7d  %.2f\n", key.first.c_str(), key.second.c_str(), tally.shapes, tally.calls, tally.failed,
                  tally.worst);
      failed += tally.failed, calls += tally.calls;
    }
    if (!calls) return std::printf("nothing was checked: no kernel fits the options\n"), 2;
    std::printf("%s: %d calls, %s\n", device_.name().c_str(), calls, failed ? "MISMATCHES" : "all right");
    return failed ? 3 : 0;
  }

 private:
  void fail(const Op& op, const std::string& kernel, const Case& c, const std::string& problem) {
    ++tallies_[{op.name, kernel}].failed;
    std::printf("%s %s %s: %s\n", op.name, kernel.c_str(), text_of(c).c_str(), problem.c_str());
  }

  // Alone, on two streams at once, and as a graph.
  void check_call(const Op& op, const std::string& kernel, const GemmShape& shape, const Case& c, const Layer& layer,
                  const GemmBuffers& in) {
    Target first(device_, c, op.workspace(&shape)), second(device_, c, op.workspace(&shape)), graph(device_, c, op.workspace(&shape));
    int status = 0;
    const auto call = [&](Target& target, void* stream) {
      GemmBuffers buffers = in;
      buffers.y = target.y.data(), buffers.workspace = target.workspace.data();
      const int code = op.run(&shape, &buffers, stream);
      if (code) status = code;
    };
    device_.run_on_two_streams([&](int i, void* stream) { call(i ? second : first, stream); });
    device_.run_as_graph([&](void* stream) { call(graph, stream); });
    if (status) return fail(op, kernel, c, "got CUDA error " + std::to_string(status) + ", expected success");
    const bool reordered = c.abits == 16 || (!c.qqq && c.group_size && anybit::config_from_tactic(shape.tactic).shares > 1);
    Tally& tally = tallies_[{op.name, kernel}];
    for (Target* target : {&first, &second, &graph}) {
      const double found = distance(target->y.fetch(), layer, c, reordered);
      target->workspace.fetch();
      ++tally.calls;
      if (reordered) tally.worst = std::max(tally.worst, found);
      const bool guards = target->y.guards_hold() && target->workspace.guards_hold();
      if (found <= 1 && guards) continue;
      const char* where = target == &first ? "" : target == &second ? " on a second stream" : " in a graph";
      fail(op, kernel, c, guards ? std::string("got outputs that differ") + where + ", expected those of the CPU" :
                                   std::string("wrote past its buffers") + where);
    }
  }

  const Options& options_;
  Device& device_;
  std::vector<Op> ops_;  // [qqq]
  std::map<std::pair<std::string, std::string>, Tally> tallies_;
};

std::vector<Case> cases(bool quick) {
  std::vector<Case> list;
  const auto abq = [&](int wbits, int levels, int abits, int sym, int group, int m, int n, int k, int32_t type, int special = 0) {
    list.push_back({false, wbits, levels, abits, sym, group, m, n, k, type, n % 2 == 1, special});
  };
  const auto qqq = [&](int group, int m, int n, int k, int32_t type, int special = 0) {
    list.push_back({true, 4, 16, 8, 1, group, m, n, k, type, n % 2 == 1, special});
  };
  for (int wbits = 1; wbits <= 8; ++wbits)
    for (const int levels : {1 << wbits, wbits == 1 ? 3 : wbits == 2 ? 5 : 0}) {
      if (!levels) continue;
      for (int abits = 2; abits <= 8; ++abits) abq(wbits, levels, abits, abits % 2, 0, quick ? 3 : 9, 70, 320, kFloat16);
      abq(wbits, levels, 8, 0, 64, 9, 35, 192, kFloat16);
      abq(wbits, levels, 16, 0, 0, 9, 70, 320, kFloat16), abq(wbits, levels, 16, 0, 64, 2, 70, 192, kBFloat16);
    }
  const std::vector<int> some_n = quick ? std::vector<int>{1, 65} : std::vector<int>{1, 63, 64, 65, 130, 257};
  const std::vector<int> some_k = quick ? std::vector<int>{33, 513} : std::vector<int>{1, 31, 33, 127, 128, 129, 513, 1040, 2100};
  for (const int n : some_n)
    for (const int k : some_k) abq(4, 16, 8, 0, 0, 2, n, k, kFloat32), qqq(0, 2, n, k, kFloat32), abq(3, 8, 16, 0, 0, 2, n, k, kFloat16);
  for (const int m : {1, 7, 8, 9, 16, 17, 63, 65}) {
    if (quick && m > 17) continue;
    abq(2, 5, 8, 0, 0, m, 66, 256, kFloat16), abq(4, 16, 4, 1, 128, m, 66, 256, kFloat16), abq(4, 16, 16, 0, 0, m, 66, 256, kFloat16);
    for (const int group : {0, 64, 128}) qqq(group, m, 66, 256, kFloat16);
  }
  for (const int group : {32, 40, 96, 128, 256, 512}) {
    abq(4, 16, 8, 0, group, 3, 33, 2 * group, kFloat16), abq(2, 4, 16, 0, group, 3, 33, 2 * group, kFloat16);
  }
  for (const int special : {1, 2})
    for (const int32_t type : {kFloat16, kBFloat16, kFloat32}) {
      abq(4, 16, 8, 0, 0, 3, 40, 256, type, special), abq(8, 256, 8, 1, 64, 3, 40, 256, type, special);
      if (special == 1) abq(4, 16, 16, 0, 64, 3, 40, 256, type, special);
      qqq(0, 3, 40, 256, type, special), qqq(128, 3, 40, 256, type, special);
    }
  return list;
}

Options parse(int argc, char** argv) {
  Options options;
  const std::string usage = "Use: anybit-selftest LIBRARY [--quick] [--op ABQGemm|QQQGemm] [--kernel NAME] [--seed N] [--list]";
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    const auto value = [&] {
      if (i + 1 == argc) throw std::invalid_argument(word + ": got no value, expected one. " + usage);
      return std::string(argv[++i]);
    };
    if (word == "--quick") options.quick = true;
    else if (word == "--list") options.list = true;
    else if (word == "--op") options.op = value();
    else if (word == "--kernel") options.kernel = value();
    else if (word == "--seed") options.seed = unsigned(std::stoul(value()));
    else if (word[0] != '-' && options.library.empty()) options.library = word;
    else throw std::invalid_argument(word + ": got this argument, expected none such. " + usage);
  }
  if (options.library.empty()) throw std::invalid_argument("LIBRARY: got none, expected a kernel library. " + usage);
  return options;
}

int run(int argc, char** argv) {
  const Options options = parse(argc, argv);
  void* library = dlopen(options.library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) throw std::invalid_argument(std::string("LIBRARY: got ") + dlerror() + ", expected a kernel library. " + kBuild);
  std::vector<Op> ops = {load_op(library, "ABQGemm", "anybit_abq_gemm"), load_op(library, "QQQGemm", "anybit_qqq_gemm")};
  const std::vector<Case> list = cases(options.quick);
  if (options.list) {
    for (const Case& c : list) std::printf("%s %s\n", ops[c.qqq].name, text_of(c).c_str());
    return 0;
  }
  const bool simulated = dlsym(library, "anybit_sim_set_seed") != nullptr;
  std::unique_ptr<Device> device;
  try {
    device = simulated ? make_host() : make_gpu();
  } catch (const std::runtime_error& error) {
    const std::string problem = std::string("GPU: got ") + error.what() + ", expected one that runs. ";
    throw std::invalid_argument(problem + "Without a GPU give the library of the CPU simulation (python -m plugins selftest --sim)");
  }
  SelfTest test(options, *device, ops);
  for (const Case& c : list) test.run(c);
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
    std::fprintf(stderr, "anybit-selftest: got %s, expected none. Report it with the output of --list.\n", error.what());
    return 3;
  }
}
