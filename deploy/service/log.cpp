// The thread that writes the log.
#include "service/log.hpp"

#include <fcntl.h>
#include <poll.h>
#include <unistd.h>

#include <anybit/error.hpp>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <ctime>

namespace anybit::service {
namespace {

constexpr size_t kMostLines = 10000;
constexpr int kPatience = 1000;  // ms for a reader of the log that does not read

std::string now() {
  const auto time = std::chrono::system_clock::now();
  const auto whole = std::chrono::time_point_cast<std::chrono::seconds>(time);
  const std::time_t seconds = std::chrono::system_clock::to_time_t(whole);
  std::tm parts{};
  gmtime_r(&seconds, &parts);
  const auto ms = std::chrono::duration_cast<std::chrono::milliseconds>(time - whole).count();
  char text[40];
  const size_t length = std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%S", &parts);
  std::snprintf(text + length, sizeof text - length, ".%03dZ", static_cast<int>(ms));
  return text;
}

}  // namespace

Log::Log(const std::string& path) : file_(2), own_(path != "-") {
  if (own_) file_ = open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0640);
  if (file_ < 0) {
    throw Error("--log",
                "got " + path + " (" + std::strerror(errno) + "), expected a file to append to",
                "Check the folder and its permissions");
  }
  thread_ = std::thread([this] { run(); });
}

Log::~Log() {
  finish();
  if (own_) close(file_);
}

void Log::finish() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_one();
  if (thread_.joinable()) thread_.join();
}

void Log::write(const char* level, const char* event, const Ordered& fields) {
  Ordered line{{"time", now()}, {"level", level}, {"event", event}};
  line.update(fields);
  std::string text = dump(line) + "\n";
  const std::lock_guard<std::mutex> lock(mutex_);
  if (lines_.size() >= kMostLines) {
    ++lost_;
    return;
  }
  lines_.push_back(std::move(text));
  changed_.notify_one();
}

void Log::run() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    changed_.wait(lock, [this] { return stopping_ || !lines_.empty(); });
    if (lines_.empty()) return;
    const std::string line = std::move(lines_.front());
    lines_.pop_front();
    lock.unlock();
    const bool written = put(line);
    lock.lock();
    if (written) continue;
    ++lost_;
    if (stopping_) {
      lost_ += lines_.size();
      return;
    }
  }
}

// A pipe that nobody empties is given up after a while: a line may then be there in part.
bool Log::put(const std::string& line) {
  for (size_t sent = 0; sent < line.size();) {
    pollfd ready{file_, POLLOUT, 0};
    if (poll(&ready, 1, kPatience) <= 0) return false;
    // No more than a pipe is sure to take at once when poll says that it takes some.
    const size_t part = std::min<size_t>(line.size() - sent, 4096);
    const ssize_t count = ::write(file_, line.data() + sent, part);
    if (count < 0 && errno != EINTR && errno != EAGAIN) return false;
    if (count > 0) sent += static_cast<size_t>(count);
  }
  return true;
}

}  // namespace anybit::service
