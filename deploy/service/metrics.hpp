// Counters and histograms in Prometheus' text format. Used on one thread.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace anybit::service {

// Counts of seconds up to fixed limits.
class Histogram {
 public:
  explicit Histogram(std::vector<double> limits)
      : limits_(std::move(limits)), counts_(limits_.size() + 1) {}
  void observe(double seconds);
  uint64_t count() const { return count_; }
  double sum() const { return sum_; }
  // The lines of a metric of this name.
  std::string text(const std::string& name) const;

 private:
  std::vector<double> limits_;
  std::vector<uint64_t> counts_;
  uint64_t count_ = 0;
  double sum_ = 0;
};

// What the service counts itself; what the engine counts is asked of it.
struct Metrics {
  Metrics();
  // Requests for text, by endpoint and outcome; each is there from the beginning.
  std::map<std::pair<std::string, std::string>, uint64_t> requests;
  // Answers of any kind, by status.
  std::map<int, uint64_t> responses;
  Histogram first_token{{0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60}};
  Histogram between_tokens{{0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5}};
  Histogram queued{{0.001, 0.01, 0.1, 0.5, 1, 5, 10, 30, 60}};
  Histogram whole{{0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600}};
};

// One metric with its help and type, from lines "{labels} value".
std::string metric(const std::string& name, const char* type, const char* help,
                   const std::vector<std::pair<std::string, double>>& values);
std::string metric(const std::string& name, const char* type, const char* help, double value);
std::string metric(const std::string& name, const char* help, const Histogram& histogram);

// label="value", escaped.
std::string label(const std::string& name, const std::string& value);

}  // namespace anybit::service
