// Finds out which TensorRT's logger we were given, and calls it.
#include "logger.h"

#include <cxxabi.h>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <typeinfo>

namespace anybit::trt {
namespace {

constexpr const char* kFinder10 = "N8nvinfer113ILoggerFinderE";  // nvinfer1::ILoggerFinder
// nvinfer1::v_1_0::ILoggerFinder
constexpr const char* kFinder11 = "N8nvinfer15v_1_013ILoggerFinderE";

struct Finder {
  void* object = nullptr;
  LoggerLayout layout = LoggerLayout::kUnknown;
};

std::mutex finder_mutex;
Finder current_finder;

// Walk from a class to its first base until a name is known; finders have one base per level.
LoggerLayout layout_of_type(const std::type_info* type) noexcept {
  while (type != nullptr) {
    if (std::strcmp(type->name(), kFinder10) == 0) return LoggerLayout::kTensorRT10;
    if (std::strcmp(type->name(), kFinder11) == 0) return LoggerLayout::kTensorRT11;
    const auto* single = dynamic_cast<const abi::__si_class_type_info*>(type);
    type = single != nullptr ? single->__base_type : nullptr;
  }
  return LoggerLayout::kUnknown;
}

// True if TensorRT's logger took the line.
bool log_to_tensorrt(Finder finder, Severity severity, const char* text) noexcept {
  try {
    if (finder.layout == LoggerLayout::kTensorRT10) {
      if (Logger10* logger = static_cast<LoggerFinder10*>(finder.object)->findLogger()) {
        logger->log(severity, text);
        return true;
      }
    } else if (finder.layout == LoggerLayout::kTensorRT11) {
      if (Logger11* logger = static_cast<LoggerFinder11*>(finder.object)->findLogger()) {
        logger->log(severity, text);
        return true;
      }
    }
  } catch (...) {  // findLogger is not noexcept
  }
  return false;
}

}  // namespace

LoggerLayout logger_layout(const void* object) noexcept {
  if (object == nullptr) return LoggerLayout::kUnknown;
  // Itanium C++ ABI: the word before a vtable's first function points to the type_info, null
  // where built with -fno-rtti.
  const auto* const* vtable = *static_cast<const void* const* const*>(object);
  return layout_of_type(static_cast<const std::type_info*>(vtable[-1]));
}

void set_finder(void* object) noexcept {
  const std::lock_guard<std::mutex> lock(finder_mutex);
  current_finder = {object, logger_layout(object)};
}

void log(Severity severity, const char* text) noexcept {
  Finder finder;
  // not held during the call: a logger written in Python waits for the interpreter's lock,
  // which our caller may hold
  {
    const std::lock_guard<std::mutex> lock(finder_mutex);
    finder = current_finder;
  }
  if (!log_to_tensorrt(finder, severity, text)) std::fprintf(stderr, "[anybit] %s\n", text);
}

}  // namespace anybit::trt
