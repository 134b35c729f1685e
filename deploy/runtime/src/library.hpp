// Libraries that are opened while the program runs.
#pragma once
#include <filesystem>
#include <string>
#include <vector>

namespace anybit {

// An open library; it stays open until the program ends, as threads of its own may run.
class Library {
 public:
  Library() = default;

  // what: for messages, such as "ONNX Runtime". fix: what to do where it does not open.
  // Throws Error: it is missing, or is no library that can be opened here.
  Library(const std::filesystem::path& path, const std::string& what, const std::string& fix);

  // Throws Error: the library has no such symbol.
  void* symbol(const char* name) const;

  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
  std::string what_;
  void* handle_ = nullptr;
};

// The folder of the library or program that this function is compiled into.
std::filesystem::path own_folder();

// What is in a folder; nothing where it cannot be read.
std::vector<std::filesystem::path> entries(const std::filesystem::path& folder);

// Where pip puts the folder `inside` of a package, that of this library or program first, then those
// of VIRTUAL_ENV, CONDA_PREFIX, .venv beside it, /usr/local, /usr and ~/.local.
std::vector<std::filesystem::path> package_folders(const std::filesystem::path& inside);

// Where a library is: `given` or the environment variable, which name it or a folder with it; else
// in one of `folders`; else empty. A file matches that is called `name`, or so with a version behind
// it (.1.23.0); the highest is taken.
//
// Throws Error: what was given is not there.
std::filesystem::path find_library(const std::filesystem::path& given, const char* option,
                                   const char* variable, const std::string& name,
                                   const std::vector<std::filesystem::path>& folders);

}  // namespace anybit
