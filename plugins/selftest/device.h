// Memory and streams of what the self-test runs on: a GPU, through the CUDA driver found at run
// time, or the host for the simulation and for native kernels.
#pragma once
#include <cstddef>
#include <functional>
#include <memory>
#include <string>

namespace selftest {

class Device {
 public:
  virtual ~Device() = default;
  virtual std::string name() const = 0;
  virtual void* allocate(size_t bytes) = 0;
  virtual void release(void* memory) = 0;
  virtual void upload(void* to, const void* from, size_t bytes) = 0;
  virtual void download(void* to, const void* from, size_t bytes) = 0;
  // work(stream) for two streams before either is waited for. Host: one after the other,
  // in two orders of threads.
  virtual void run_on_two_streams(const std::function<void(int, void*)>& work) = 0;
  // work(stream) recorded in a CUDA graph, then the graph run twice, so that what a run leaves
  // behind meets the next. Host: work twice, in an order of threads in which warps get far apart.
  virtual void run_as_graph(const std::function<void(void*)>& work) = 0;
  virtual void synchronize() = 0;
};

// Throws std::runtime_error with what there is instead of a GPU that runs the kernels.
std::unique_ptr<Device> make_gpu();
// set_order: of the simulation, see simt::launch; native kernels have no order.
std::unique_ptr<Device> make_host(std::string name, std::function<void(unsigned)> set_order);

}  // namespace selftest
