// Errors of the plugins: the same three parts as in Python (where, got against expected, what to
// do), sent to TensorRT's logger.
#pragma once
#include <cstdarg>
#include <cstdio>
#include <string>

#include "core/tensorrt/abi/logger.h"

namespace anybit {

// printf into a string; longer texts are cut at 500 characters.
__attribute__((format(printf, 1, 2))) inline std::string format(const char* pattern, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, pattern);
  std::vsnprintf(text, sizeof text, pattern, arguments);
  va_end(arguments);
  return text;
}

// Logs "where: problem. fix." as an error and returns false, so that a check can end with it.
inline bool fail(const std::string& where, const std::string& problem, const std::string& fix) {
  trt::log(trt::Severity::kError, (where + ": " + problem + ". " + fix + ".").c_str());
  return false;
}

}  // namespace anybit
