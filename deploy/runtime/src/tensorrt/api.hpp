// TensorRT through its C++ ABI, opened at run time: plugins, engines and contexts that free themselves.
#pragma once
#include <array>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "cache_form.hpp"
#include "library.hpp"
#include "tensorrt/cuda.hpp"
#include "tensorrt/layout.hpp"

namespace anybit::trt {

// An edition as engine.json names it, and as people do.
struct Edition {
  const char *name, *title;
  const char* library;  // its file, but for the version
  const char* package;  // the folder of Python packages that has it
  const char* install;
};

// Throws Error: there is none of this name.
const Edition& find_edition(const std::string& name, const std::string& where,
                            const std::string& fix);

// The library.
class Api {
 public:
  // Throws Error: it does not open, or is of a version whose layout is not known.
  Api(const std::filesystem::path& library, const Edition& edition);

  const Edition& edition() const { return edition_; }
  const std::string& version() const { return version_; }  // such as 10.15.1.29
  const Layout& layout() const { return *layout_; }

  // Registers the plugins of a library, once in a process: they stay.
  //
  // Throws Error: it does not load, or lacks one of `ops`, or another one was loaded before.
  void load_plugins(const std::filesystem::path& library,
                    const std::vector<std::string>& ops) const;

  // Null where TensorRT makes none.
  void* create_runtime() const;

 private:
  const Edition& edition_;
  Library library_;
  std::string version_;
  const Layout* layout_ = nullptr;
};

// An object of TensorRT's that is a shell around another.
class Shell {
 public:
  Shell() = default;
  explicit Shell(void* object) : object_(object) {}
  Shell(Shell&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Shell& operator=(Shell&& other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Shell();

  explicit operator bool() const { return object_ != nullptr; }
  void* behind() const { return static_cast<void**>(object_)[1]; }

 private:
  void* object_ = nullptr;
};

enum class Profile : int32_t { kPrefill = 0, kDecode = 1 };  // in the order of engine.json

// Runs an engine; of one thread at a time.
class Context {
 public:
  // memory: for what it computes, of at least Engine::memory(profile) bytes.
  // Throws Error: TensorRT refuses it.
  Context(const Api& api, void* engine, Profile profile, cuda::Address memory, size_t bytes,
          cuda::Stream stream);

  // Throws Error: TensorRT refuses the shape or the address.
  void shape(const std::string& name, const std::vector<int64_t>& dims);
  void address(const std::string& name, cuda::Address address);
  // Throws Error: TensorRT cannot queue the step.
  void enqueue(cuda::Stream stream);

 private:
  const Layout* layout_;
  Shell context_;
};

class Engine {
 public:
  // Throws Error: there is no driver, or TensorRT refuses the file.
  Engine(const Api& api, const std::filesystem::path& file);

  const Tensors& inputs() const { return inputs_; }
  const Tensors& outputs() const { return outputs_; }
  // The largest size of an input's dimension.
  int64_t most(const std::string& input, Profile profile, size_t dimension) const;
  size_t memory(Profile profile) const;
  Context context(Profile profile, cuda::Address memory, size_t bytes, cuda::Stream stream) const;

 private:
  const Api& api_;
  std::string where_;
  Shell runtime_, engine_;  // in this order: the engine goes first
  Tensors inputs_, outputs_;
};

}  // namespace anybit::trt
