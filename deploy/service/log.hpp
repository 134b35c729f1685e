// A log of one JSON object a line. Whoever logs never waits for the disk or the reader.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <string>
#include <thread>

#include "service/json.hpp"

namespace anybit::service {

// Writes lines on a thread of its own. Where the disk is full, or lines come faster than they can be
// written, they are dropped and counted: a service goes on without its log.
class Log {
 public:
  // @param path a file that is appended to; "-" is standard error.
  // Throws Error: the file cannot be opened.
  explicit Log(const std::string& path);
  ~Log();
  Log(const Log&) = delete;
  Log& operator=(const Log&) = delete;

  // Adds time and level in front. Safe on any thread.
  void write(const char* level, const char* event, const Ordered& fields = Ordered::object());

  // Writes what waits, as far as somebody takes it within a second, and nothing more from then on.
  void finish();

  uint64_t lost() const { return lost_; }

 private:
  void run();
  bool put(const std::string& line);

  int file_;
  bool own_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::string> lines_;
  bool stopping_ = false;
  std::atomic<uint64_t> lost_{0};
  std::thread thread_;
};

}  // namespace anybit::service
