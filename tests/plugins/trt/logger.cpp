// Registers a logger finder as one TensorRT version lays it out, logs through it, and prints what
// arrived. -DLAYOUT=10 or 11: the classes below, which repeat that version's layout; -DLAYOUT=0:
// the classes of NVIDIA's own headers.
#include "core/tensorrt/abi/logger.h"

#include <cstdint>
#include <cstdio>

namespace nvinfer1 {
#if LAYOUT == 10
class ILogger {
 public:
  enum class Severity : int32_t { kERROR = 1 };
  virtual void log(Severity severity, const char* text) noexcept = 0;
  virtual ~ILogger() = default;
};
class ILoggerFinder {
 public:
  virtual ILogger* findLogger() = 0;

 protected:
  virtual ~ILoggerFinder() = default;
};
#elif LAYOUT == 11
namespace v_1_0 {
class ILogger : public IVersionedInterface {
 public:
  enum class Severity : int32_t { kERROR = 1 };
  InterfaceInfo getInterfaceInfo() const noexcept override { return {"ILogger", 1, 0}; }
  virtual void log(Severity severity, const char* text) noexcept = 0;
};
class ILoggerFinder : public IVersionedInterface {
 public:
  InterfaceInfo getInterfaceInfo() const noexcept override { return {"ILoggerFinder", 1, 0}; }
  virtual ILogger* findLogger() = 0;
};
}  // namespace v_1_0
using ILogger = v_1_0::ILogger;
using ILoggerFinder = v_1_0::ILoggerFinder;
#endif
}  // namespace nvinfer1

struct Printer : nvinfer1::ILogger {
  void log(Severity severity, const char* text) noexcept override {
    std::printf("severity %d: %s\n", static_cast<int>(severity), text);
  }
};

struct Finder : nvinfer1::ILoggerFinder {
  nvinfer1::ILogger* logger = nullptr;
  nvinfer1::ILogger* findLogger() override { return logger; }
};

// What a library built without any known type would pass.
struct Stranger {
  virtual ~Stranger() = default;
};

int main() {
  Printer printer;
  Finder finder;
  Stranger stranger;
  std::printf(
      "layout %d\n",
      static_cast<int>(anybit::trt::logger_layout(static_cast<nvinfer1::ILoggerFinder*>(&finder))));
  anybit::trt::set_finder(static_cast<nvinfer1::ILoggerFinder*>(&finder));
  anybit::trt::log(anybit::trt::Severity::kError, "no logger yet");
  finder.logger = &printer;
  anybit::trt::log(anybit::trt::Severity::kError, "through the logger");
  anybit::trt::set_finder(&stranger);
  anybit::trt::log(anybit::trt::Severity::kError, "from a stranger");
  anybit::trt::set_finder(nullptr);
  anybit::trt::log(anybit::trt::Severity::kError, "without a finder");
}
