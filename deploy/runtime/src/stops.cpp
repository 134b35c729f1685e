// Looks for stop strings in text that comes in pieces.
#include "stops.hpp"

#include <algorithm>

namespace anybit {
namespace {

// Bytes at the end of `text` that `stop` begins with; not all of `stop`, which would have been found.
size_t begun(const std::string& text, const std::string& stop) {
  for (size_t length = std::min(text.size(), stop.size() - 1); length > 0; --length) {
    if (text.compare(text.size() - length, length, stop, 0, length) == 0) return length;
  }
  return 0;
}

}  // namespace

std::string Stops::push(const std::string& text) {
  if (!found_.empty()) return "";
  held_ += text;
  size_t first = std::string::npos;
  for (const std::string& stop : stops_) {
    const size_t at = held_.find(stop);
    if (at < first) {
      first = at;
      found_ = stop;
    }
  }
  size_t keep = 0;
  if (found_.empty()) {
    for (const std::string& stop : stops_) keep = std::max(keep, begun(held_, stop));
    first = held_.size() - keep;
  }
  std::string shown = held_.substr(0, first);
  held_ = found_.empty() ? held_.substr(first) : "";
  return shown;
}

std::string Stops::finish() {
  std::string rest;
  rest.swap(held_);
  return rest;
}

}  // namespace anybit
