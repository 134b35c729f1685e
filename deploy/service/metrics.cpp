// Prometheus' text format, version 0.0.4.
#include "service/metrics.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>

namespace anybit::service {
namespace {

std::string number(double value) {
  char text[32];
  const bool whole = std::floor(value) == value && std::fabs(value) < 1e15;
  std::snprintf(text, sizeof text, whole ? "%.0f" : "%.10g", value);
  return text;
}

std::string head(const std::string& name, const char* type, const char* help) {
  return "# HELP " + name + " " + help + "\n# TYPE " + name + " " + type + "\n";
}

}  // namespace

// A rate sees the first failure only where a 0 was read before it.
Metrics::Metrics() {
  for (const char* endpoint : {"chat", "completions"}) {
    for (const char* outcome : {"ok", "refused", "queue_full", "not_ready", "client_gone",
                                "slow_client", "deadline", "shutdown", "failed"}) {
      requests[{endpoint, outcome}] = 0;
    }
  }
}

void Histogram::observe(double seconds) {
  const auto place = std::lower_bound(limits_.begin(), limits_.end(), seconds);
  ++counts_[static_cast<size_t>(place - limits_.begin())];
  ++count_;
  sum_ += seconds;
}

std::string Histogram::text(const std::string& name) const {
  std::string lines;
  uint64_t below = 0;
  for (size_t i = 0; i <= limits_.size(); ++i) {
    below += counts_[i];
    const std::string limit = i < limits_.size() ? number(limits_[i]) : "+Inf";
    lines += name + "_bucket{le=\"" + limit + "\"} " + std::to_string(below) + "\n";
  }
  return lines + name + "_sum " + number(sum_) + "\n" + name + "_count " + std::to_string(count_) +
         "\n";
}

std::string metric(const std::string& name, const char* type, const char* help,
                   const std::vector<std::pair<std::string, double>>& values) {
  std::string lines = head(name, type, help);
  for (const auto& [labels, value] : values) {
    lines += name + (labels.empty() ? "" : "{" + labels + "}") + " " + number(value) + "\n";
  }
  return lines;
}

std::string metric(const std::string& name, const char* type, const char* help, double value) {
  return metric(name, type, help, {{"", value}});
}

std::string metric(const std::string& name, const char* help, const Histogram& histogram) {
  return head(name, "histogram", help) + histogram.text(name);
}

std::string label(const std::string& name, const std::string& value) {
  std::string text = name + "=\"";
  for (const char c : value) {
    if (c == '\n') {
      text += "\\n";
      continue;
    }
    if (c == '"' || c == '\\') text += '\\';
    text += c;
  }
  return text + "\"";
}

}  // namespace anybit::service
