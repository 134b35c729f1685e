// Finds and opens shared libraries.
#include "library.hpp"

#include <dlfcn.h>

#include <cstdlib>
#include <cstring>

#include "anybit/error.hpp"

namespace anybit {

namespace fs = std::filesystem;

namespace {

// Whether a file is called `name` or, with a version behind it, name.1.23.0.
bool is_version_of(const std::string& file, const std::string& name) {
  if (file.compare(0, name.size(), name) != 0) return false;
  const std::string version = file.substr(name.size());
  return version.empty() || (version[0] == '.' && version.size() > 1 &&
                             version.find_first_not_of(".0123456789") == std::string::npos);
}

// The library of this name in a folder, of several the one whose version is the highest; empty.
fs::path newest(const fs::path& folder, const std::string& name) {
  fs::path best;
  for (const fs::path& path : entries(folder)) {
    const std::string found = path.filename().string();
    if (!is_version_of(found, name)) continue;
    if (best.empty() || strverscmp(found.c_str(), best.filename().c_str()) > 0) best = path;
  }
  return best;
}

}  // namespace

std::vector<fs::path> entries(const fs::path& folder) {
  std::vector<fs::path> found;
  std::error_code error;
  for (fs::directory_iterator at(folder, error), end; !error && at != end; at.increment(error)) {
    found.push_back(at->path());
  }
  return found;
}

Library::Library(const fs::path& path, const std::string& what, const std::string& fix)
    : path_(path), what_(what), handle_(dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) {
  if (handle_) return;
  const char* reason = dlerror();
  throw Error(
      what, std::string("got \"") + (reason ? reason : "") + "\", expected a library to open", fix);
}

void* Library::symbol(const char* name) const {
  if (void* found = dlsym(handle_, name)) return found;
  throw Error(path_.string(), std::string("got a library without ") + name + ", expected " + what_,
              "Name the right one");
}

fs::path own_folder() {
  Dl_info info;
  std::error_code error;
  if (!dladdr(reinterpret_cast<void*>(&own_folder), &info) || !info.dli_fname) return "";
  const fs::path path = fs::canonical(info.dli_fname, error);
  // Of a program the system tells the name that it was called by.
  return (error ? fs::canonical("/proc/self/exe", error) : path).parent_path();
}

std::vector<fs::path> package_folders(const fs::path& inside) {
  std::vector<fs::path> folders{own_folder()};
  std::vector<fs::path> prefixes;
  for (const char* variable : {"VIRTUAL_ENV", "CONDA_PREFIX"}) {
    if (const char* value = std::getenv(variable); value && *value) prefixes.emplace_back(value);
  }
  prefixes.insert(prefixes.end(), {own_folder().parent_path() / ".venv", "/usr/local", "/usr"});
  if (const char* home = std::getenv("HOME")) prefixes.push_back(fs::path(home) / ".local");
  for (const fs::path& prefix : prefixes) {
    for (const fs::path& python : entries(prefix / "lib")) {
      for (const char* packages : {"site-packages", "dist-packages"}) {
        folders.push_back(python / packages / inside);
      }
    }
  }
  return folders;
}

fs::path find_library(const fs::path& given, const char* option, const char* variable,
                      const std::string& name, const std::vector<fs::path>& folders) {
  const char* value = std::getenv(variable);
  const bool from_environment = given.empty() && value && *value;
  const fs::path named = from_environment ? fs::path(value) : given;
  if (!named.empty()) {
    std::error_code error;
    const fs::path found = fs::is_directory(named, error) ? newest(named, name) : named;
    if (!found.empty() && fs::exists(found, error)) return found;
    throw Error(from_environment ? variable : option,
                "got " + named.string() + ", expected " + name + " or a folder that has it",
                "Name the right one");
  }
  for (const fs::path& folder : folders) {
    if (const fs::path found = newest(folder, name); !found.empty()) return found;
  }
  return "";
}

}  // namespace anybit
