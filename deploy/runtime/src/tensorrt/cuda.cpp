// Opens the CUDA driver and its first GPU.
#include "tensorrt/cuda.hpp"

#include "anybit/error.hpp"

namespace anybit::cuda {
namespace {

constexpr int kSuccess = 0, kOutOfMemory = 2;                // CUresult
constexpr int kCapabilityMajor = 75, kCapabilityMinor = 76;  // CUdevice_attribute
constexpr unsigned kOwnQueue = 1;                            // CU_STREAM_NON_BLOCKING
const char* const kInstall = "Install NVIDIA's driver, or run the ONNX file (backend onnxruntime)";

}  // namespace

Driver::Driver(const std::filesystem::path& library)
    : library_(library.empty() ? "libcuda.so.1" : library, "the CUDA driver", kInstall) {
  const auto refuse = [](const std::string& got) {
    return Error("the CUDA driver", "got " + got + ", expected a GPU",
                 "Look whether nvidia-smi shows one, or run the ONNX file (backend onnxruntime)");
  };
  if (const int status = Call<unsigned>(*this, "cuInit").quietly(0); status != kSuccess) {
    throw refuse("\"" + reason(status) + "\"");
  }
  int count = 0;
  Call<int*>(*this, "cuDeviceGetCount")(&count);
  if (count == 0) throw refuse("none");
  Call<Device*, int>(*this, "cuDeviceGet")(&device_, 0);
  char name[256] = "";
  Call<char*, int, Device>(*this, "cuDeviceGetName")(name, sizeof name, device_);
  name_ = name;
  const Call<int*, int, Device> attribute(*this, "cuDeviceGetAttribute");
  int major = 0, minor = 0;
  attribute(&major, kCapabilityMajor, device_);
  attribute(&minor, kCapabilityMinor, device_);
  capability_ = std::to_string(major) + "." + std::to_string(minor);
}

Driver::~Driver() {
  if (context_) Call<Device>(*this, "cuDevicePrimaryCtxRelease_v2").quietly(device_);
}

void Driver::use() {
  if (!context_) Call<Context*, Device>(*this, "cuDevicePrimaryCtxRetain")(&context_, device_);
  Call<Context>(*this, "cuCtxSetCurrent")(context_);
}

size_t Driver::free_memory() const {
  size_t free = 0, total = 0;
  Call<size_t*, size_t*>(*this, "cuMemGetInfo_v2")(&free, &total);
  return free;
}

std::string Driver::lost() const {
  const int status = Call<>(*this, "cuCtxSynchronize").quietly();
  if (status == kSuccess) return "";
  return "got \"" + reason(status) +
         "\" from every call of the GPU since one failed, expected success; the system's "
         "log may say why, and this process cannot use the GPU any more";
}

void Driver::check(int status, const char* call) const {
  if (status == kSuccess) return;
  if (status == kOutOfMemory) {
    throw Unavailable(call, "got \"" + reason(status) + "\", expected memory of the GPU",
                      "Load with fewer slots or a smaller capacity, or end what else uses the GPU");
  }
  throw Error(call, "got \"" + reason(status) + "\", expected success",
              "Look whether nvidia-smi shows the GPU in order");
}

std::string Driver::reason(int status) const {
  const char *name = nullptr, *text = nullptr;
  const Call<int, const char**> names(*this, "cuGetErrorName"), texts(*this, "cuGetErrorString");
  if (names.quietly(status, &name) != kSuccess || !name) return "error " + std::to_string(status);
  if (texts.quietly(status, &text) != kSuccess || !text) return name;
  return std::string(name) + ": " + text;
}

KeptContext::KeptContext(const Driver& driver)
    : set_(reinterpret_cast<int (*)(Context)>(driver.symbol("cuCtxSetCurrent"))) {
  Call<Context*>(driver, "cuCtxGetCurrent")(&context_);
}

Memory allocate(const Driver& driver, size_t bytes) {
  Address made = 0;
  driver.allocate(&made, bytes > 0 ? bytes : 1);
  return {driver, made};
}

HostMemory allocate_host(const Driver& driver, size_t bytes) {
  void* made = nullptr;
  driver.allocate_host(&made, bytes > 0 ? bytes : 1, 0);
  return {driver, made};
}

OwnedStream create_stream(const Driver& driver) {
  Stream made = nullptr;
  driver.create_stream(&made, kOwnQueue);
  return {driver, made};
}

}  // namespace anybit::cuda
