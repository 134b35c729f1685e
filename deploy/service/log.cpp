// The thread that writes the log.
#include "service/log.hpp"

#include <fcntl.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <anybit/error.hpp>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <ctime>
#include <utility>

namespace anybit::service {
namespace {

constexpr size_t kMostLines = 10000;
constexpr std::chrono::seconds kPatience{1};  // for a reader of the log that does not read
using Clock = std::chrono::steady_clock;

int open_file(const std::string& path) {
  return open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0640);
}

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

Log::Log(const std::string& path) : path_(path), file_(2), own_(path != "-") {
  if (own_) file_ = open_file(path);
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

void Log::reopen() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    reopen_ = own_;
  }
  changed_.notify_one();
}

void Log::finish() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!stopping_) end_ = Clock::now() + kPatience;
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
    changed_.wait(lock, [this] { return stopping_ || reopen_ || !lines_.empty(); });
    if (reopen_) {
      reopen_ = false;
      lock.unlock();
      open_again();
      lock.lock();
      continue;
    }
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

// Where that fails, the log goes on in the file that it has.
void Log::open_again() {
  const int file = open_file(path_);
  if (file < 0) return write("error", "log", {{"problem", path_ + ": " + std::strerror(errno)}});
  close(std::exchange(file_, file));
  torn_ = false;
}

// A pipe that nobody empties is given up after a while: a line may then be there in part, and the
// next one begins on a line of its own.
bool Log::put(const std::string& line) {
  const Time until = Clock::now() + kPatience;
  if (torn_ && !put("\n", until)) return false;
  torn_ = false;
  return put(line, until);
}

bool Log::put(const std::string& text, Time until) {
  for (size_t sent = 0; sent < text.size();) {
    // Within the time for this line, and where the log ends, within what is left for all of them.
    const auto left =
        std::chrono::ceil<std::chrono::milliseconds>(std::min(until, end_.load()) - Clock::now());
    pollfd ready{file_, POLLOUT, 0};
    if (poll(&ready, 1, std::max(0, static_cast<int>(left.count()))) <= 0) return false;
    // No more than a pipe is sure to take at once when poll says that it takes some.
    const size_t part = std::min<size_t>(text.size() - sent, 4096);
    const ssize_t count = ::write(file_, text.data() + sent, part);
    if (count < 0 && errno != EINTR && errno != EAGAIN) return false;
    if (count <= 0) continue;
    sent += static_cast<size_t>(count);
    torn_ = sent < text.size();
  }
  return true;
}

}  // namespace anybit::service
