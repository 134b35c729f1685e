// Memory and streams of what the self-test runs on: a GPU, through the CUDA driver found at run time, or the host for the simulation.
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
  // work(stream) for two streams before either is waited for. Host: one after the other.
  virtual void run_on_two_streams(const std::function<void(int, void*)>& work) = 0;
  // work(stream) recorded in a CUDA graph, then the graph run. Host: work itself.
  virtual void run_as_graph(const std::function<void(void*)>& work) = 0;
  virtual void synchronize() = 0;
};

// Throws std::runtime_error with what is missing.
std::unique_ptr<Device> make_gpu();
std::unique_ptr<Device> make_host();

}  // namespace selftest
