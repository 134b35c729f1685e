#include "selftest/device.h"

#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <utility>

namespace selftest {
namespace {

constexpr int kComputeCapabilityMajor = 75;  // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR

class Host final : public Device {
 public:
  Host(std::string name, std::function<void(unsigned)> set_order)
      : name_(std::move(name)), set_order_(std::move(set_order)) {}
  std::string name() const override { return name_; }
  void* allocate(size_t bytes) override {
    return std::aligned_alloc(256, (bytes + 511) / 256 * 256);
  }
  void release(void* memory) override { std::free(memory); }
  void upload(void* to, const void* from, size_t bytes) override { std::memcpy(to, from, bytes); }
  void download(void* to, const void* from, size_t bytes) override { std::memcpy(to, from, bytes); }
  void run_on_two_streams(const std::function<void(int, void*)>& work) override {
    for (const int i : {0, 1}) set_order_(unsigned(i)), work(i, nullptr);
  }
  void run_as_graph(const std::function<void(void*)>& work) override {
    set_order_(2), work(nullptr), work(nullptr);
  }
  void synchronize() override {}

 private:
  std::string name_;
  std::function<void(unsigned)> set_order_;
};

// The driver's own interface (CUDA Driver API), as no CUDA runtime need be installed:
// results are 0 for success.
class Gpu final : public Device {
 public:
  Gpu() {
    driver_ = dlopen("libcuda.so.1", RTLD_NOW);
    if (!driver_) throw std::runtime_error("no CUDA driver (libcuda.so.1)");
    check(call<int(unsigned)>("cuInit")(0), "cuInit");
    int device = 0, major = 0;
    check(call<int(int*, int)>("cuDeviceGet")(&device, 0), "cuDeviceGet");
    char text[256] = {};
    check(call<int(char*, int, int)>("cuDeviceGetName")(text, sizeof text, device),
          "cuDeviceGetName");
    name_ = text;
    check(
        call<int(int*, int, int)>("cuDeviceGetAttribute")(&major, kComputeCapabilityMajor, device),
        "cuDeviceGetAttribute");
    if (major < 8)
      throw std::runtime_error(name_ + " of compute capability " + std::to_string(major) + ".x");
    void* context = nullptr;
    check(call<int(void**, int)>("cuDevicePrimaryCtxRetain")(&context, device),
          "cuDevicePrimaryCtxRetain");
    check(call<int(void*)>("cuCtxSetCurrent")(context), "cuCtxSetCurrent");
    // non-blocking
    for (void*& stream : streams_)
      check(call<int(void**, unsigned)>("cuStreamCreate")(&stream, 1), "cuStreamCreate");
  }
  std::string name() const override { return name_; }
  void* allocate(size_t bytes) override {
    unsigned long long memory = 0;
    check(call<int(unsigned long long*, size_t)>("cuMemAlloc_v2")(&memory, bytes), "cuMemAlloc");
    return reinterpret_cast<void*>(memory);
  }
  void release(void* memory) override {
    call<int(unsigned long long)>("cuMemFree_v2")(address(memory));
  }
  void upload(void* to, const void* from, size_t bytes) override {
    check(call<int(unsigned long long, const void*, size_t)>("cuMemcpyHtoD_v2")(address(to), from,
                                                                                bytes),
          "cuMemcpyHtoD");
  }
  void download(void* to, const void* from, size_t bytes) override {
    check(call<int(void*, unsigned long long, size_t)>("cuMemcpyDtoH_v2")(to, address(from), bytes),
          "cuMemcpyDtoH");
  }
  void run_on_two_streams(const std::function<void(int, void*)>& work) override {
    synchronize();
    for (int i = 0; i < 2; ++i) work(i, streams_[i]);
    synchronize();
  }
  void run_as_graph(const std::function<void(void*)>& work) override {
    void *graph = nullptr, *ready = nullptr;
    check(call<int(void*, int)>("cuStreamBeginCapture_v2")(streams_[0], 0), "cuStreamBeginCapture");
    work(streams_[0]);
    check(call<int(void*, void**)>("cuStreamEndCapture")(streams_[0], &graph),
          "cuStreamEndCapture");
    check(call<int(void**, void*, unsigned long long)>("cuGraphInstantiateWithFlags")(&ready, graph,
                                                                                      0),
          "cuGraphInstantiate");
    for (int i = 0; i < 2; ++i)
      check(call<int(void*, void*)>("cuGraphLaunch")(ready, streams_[0]), "cuGraphLaunch");
    synchronize();
    call<int(void*)>("cuGraphExecDestroy")(ready);
    call<int(void*)>("cuGraphDestroy")(graph);
  }
  void synchronize() override { check(call<int()>("cuCtxSynchronize")(), "cuCtxSynchronize"); }

 private:
  static unsigned long long address(const void* memory) {
    return reinterpret_cast<unsigned long long>(memory);
  }
  template <class F>
  F* call(const char* function) const {
    void* found = dlsym(driver_, function);
    if (!found) throw std::runtime_error(std::string("a CUDA driver without ") + function);
    return reinterpret_cast<F*>(found);
  }
  static void check(int code, const char* function) {
    if (code) throw std::runtime_error("error " + std::to_string(code) + " from " + function);
  }

  void* driver_ = nullptr;
  void* streams_[2] = {};
  std::string name_;
};

}  // namespace

std::unique_ptr<Device> make_gpu() { return std::make_unique<Gpu>(); }
std::unique_ptr<Device> make_host(std::string name, std::function<void(unsigned)> set_order) {
  return std::make_unique<Host>(std::move(name), std::move(set_order));
}

}  // namespace selftest
