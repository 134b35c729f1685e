// CUDA through its driver library, opened at run time: what a backend on one GPU needs.
#pragma once
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <utility>

#include "library.hpp"

struct CUctx_st;
struct CUstream_st;
struct CUgraph_st;
struct CUgraphExec_st;

namespace anybit::cuda {

// As in cuda.h, whose types these are (the part of the ABI that CUDA 11.4 and all later ones have).
using Device = int;
using Context = CUctx_st*;
using Stream = CUstream_st*;
using Graph = CUgraph_st*;
using GraphExec = CUgraphExec_st*;
using Address = uint64_t;  // of memory of the GPU

class Driver;

// A function of the driver. Throws Error where it fails.
template <class... Arguments>
class Call {
 public:
  Call(const Driver& driver, const char* name);
  void operator()(Arguments... arguments) const;
  // The status instead, for where nobody can be told.
  int quietly(Arguments... arguments) const { return function_(arguments...); }

 private:
  const Driver& driver_;
  const char* const name_;
  int (*const function_)(Arguments...);
};

// The driver and the first GPU that it shows.
class Driver {
 public:
  // library: empty is the system's.
  // Throws Error: there is none, or it shows no GPU.
  explicit Driver(const std::filesystem::path& library);
  ~Driver();
  Driver(const Driver&) = delete;
  Driver& operator=(const Driver&) = delete;

  const std::string& name() const { return name_; }              // of the GPU
  const std::string& capability() const { return capability_; }  // such as "9.0"

  // Makes the GPU the one of the calling thread. TensorRT's own calls find it so.
  void use();
  size_t free_memory() const;
  // What is wrong with the GPU since a failure that no later call can mend; "" of a good one. Waits
  // for what is running.
  std::string lost() const;

  // For Call: what the library has, and an Error where a status is none of success.
  void* symbol(const char* name) const { return library_.symbol(name); }
  void check(int status, const char* call) const;

 private:
  std::string reason(int status) const;

  Library library_;
  Context context_ = nullptr;
  Device device_ = 0;
  std::string name_, capability_;

 public:
  const Call<Address*, size_t> allocate{*this, "cuMemAlloc_v2"};
  const Call<Address> free{*this, "cuMemFree_v2"};
  const Call<void**, size_t, unsigned> allocate_host{*this, "cuMemHostAlloc"};
  const Call<void*> free_host{*this, "cuMemFreeHost"};
  const Call<Stream*, unsigned> create_stream{*this, "cuStreamCreate"};
  const Call<Stream> destroy_stream{*this, "cuStreamDestroy_v2"};
  const Call<Stream> wait{*this, "cuStreamSynchronize"};
  const Call<Address, const void*, size_t, Stream> upload{*this, "cuMemcpyHtoDAsync_v2"};
  const Call<void*, Address, size_t, Stream> download{*this, "cuMemcpyDtoHAsync_v2"};
  const Call<Address, Address, size_t, Stream> copy{*this, "cuMemcpyDtoDAsync_v2"};
  const Call<Address, unsigned char, size_t, Stream> fill{*this, "cuMemsetD8Async"};
  const Call<Stream, int> begin_capture{*this, "cuStreamBeginCapture_v2"};
  const Call<Stream, Graph*> end_capture{*this, "cuStreamEndCapture"};
  const Call<GraphExec*, Graph, unsigned long long> instantiate{*this,
                                                                "cuGraphInstantiateWithFlags"};
  const Call<GraphExec, Stream> launch{*this, "cuGraphLaunch"};
  const Call<GraphExec> destroy_exec{*this, "cuGraphExecDestroy"};
  const Call<Graph> destroy_graph{*this, "cuGraphDestroy"};
};

// Gives the thread back the context that it had: a program may work on a GPU of its own on the thread
// that loads or ends a model. May outlive the driver.
class KeptContext {
 public:
  explicit KeptContext(const Driver& driver);
  KeptContext(const KeptContext&) = delete;
  KeptContext& operator=(const KeptContext&) = delete;
  ~KeptContext() { set_(context_); }

 private:
  int (*const set_)(Context);
  Context context_ = nullptr;
};

// Something that a function of the driver frees; the driver must outlive it.
template <class Handle, const Call<Handle> Driver::* free>
class Owned {
 public:
  Owned() = default;
  Owned(const Driver& driver, Handle handle) : driver_(&driver), handle_(handle) {}
  Owned(Owned&& other) noexcept
      : driver_(other.driver_), handle_(std::exchange(other.handle_, Handle{})) {}
  Owned& operator=(Owned&& other) noexcept {
    std::swap(driver_, other.driver_);
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Owned() {
    if (handle_ != Handle{}) (driver_->*free).quietly(handle_);
  }
  Handle get() const { return handle_; }
  explicit operator bool() const { return handle_ != Handle{}; }

 private:
  const Driver* driver_ = nullptr;
  Handle handle_{};
};

using Memory = Owned<Address, &Driver::free>;
using HostMemory = Owned<void*, &Driver::free_host>;  // that copies need not stage
using OwnedStream = Owned<Stream, &Driver::destroy_stream>;
using OwnedGraph = Owned<Graph, &Driver::destroy_graph>;
using OwnedExec = Owned<GraphExec, &Driver::destroy_exec>;

// Throws Error: the GPU has not enough, or the call fails otherwise.
Memory allocate(const Driver& driver, size_t bytes);
HostMemory allocate_host(const Driver& driver, size_t bytes);
OwnedStream create_stream(const Driver& driver);

template <class... Arguments>
Call<Arguments...>::Call(const Driver& driver, const char* name)
    : driver_(driver),
      name_(name),
      function_(reinterpret_cast<int (*)(Arguments...)>(driver.symbol(name))) {}

template <class... Arguments>
void Call<Arguments...>::operator()(Arguments... arguments) const {
  driver_.check(function_(arguments...), name_);
}

}  // namespace anybit::cuda
