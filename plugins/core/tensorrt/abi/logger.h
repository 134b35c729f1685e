// Sends messages to TensorRT's own logger, whose C++ layout differs between TensorRT 10 and 11.
//
// setLoggerFinder hands us an object without saying which TensorRT it comes from. In TensorRT 10
// both the finder and the logger begin with their one virtual function; in TensorRT 11 and
// TensorRT-RTX 1.7 they derive from IVersionedInterface, which puts four others in front. Calling
// the wrong slot runs a destructor, so we ask the object's run-time type which of the two it is,
// and write to stderr when we cannot tell. The layouts are therefore declared here under our own
// names, whatever NvInferRuntime.h is in use.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>

namespace anybit::trt {

enum class Severity : int32_t {
  kInternalError = 0,
  kError = 1,
  kWarning = 2,
  kInfo = 3,
  kVerbose = 4
};

// TensorRT 10: nvinfer1::ILogger and nvinfer1::ILoggerFinder.
class Logger10 {
 public:
  virtual void log(Severity severity, const char* text) noexcept = 0;
  virtual ~Logger10() = default;
};
class LoggerFinder10 {
 public:
  virtual Logger10* findLogger() = 0;
  virtual ~LoggerFinder10() = default;
};

// TensorRT 11 and TensorRT-RTX 1.7: nvinfer1::v_1_0::ILogger and nvinfer1::v_1_0::ILoggerFinder.
class Logger11 : public nvinfer1::IVersionedInterface {
 public:
  virtual void log(Severity severity, const char* text) noexcept = 0;
};
class LoggerFinder11 : public nvinfer1::IVersionedInterface {
 public:
  virtual Logger11* findLogger() = 0;
};

// Which of the two layouts a logger finder has; kUnknown when its run-time type does not say.
enum class LoggerLayout { kUnknown, kTensorRT10, kTensorRT11 };
LoggerLayout logger_layout(const void* finder) noexcept;

// Remember the finder (null forgets it); log() uses it from then on.
void set_finder(void* finder) noexcept;

// Send one line to TensorRT's logger, or to stderr if there is none.
void log(Severity severity, const char* text) noexcept;

}  // namespace anybit::trt
