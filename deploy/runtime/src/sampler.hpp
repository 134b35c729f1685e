// Chooses one token after the other of a text.
#pragma once
#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "anybit/sampling.hpp"

namespace anybit {

struct Choice {
  int32_t id = 0;
  float logprob = 0;
  std::vector<std::pair<int32_t, float>> top;
};

// Throws Error: a field is out of range or names a token that is none.
void check_sampling(const Sampling& sampling, int vocab);

class Sampler {
 public:
  Sampler(Sampling sampling, int vocab, const std::vector<int32_t>& prompt);

  // The next token, which is taken into account from then on. Throws Error: the logits, [vocab], are
  // no numbers.
  Choice choose(const float* logits);

 private:
  bool plain() const;
  void score(const float* logits);
  void sort(size_t count);
  int32_t draw();
  void report(Choice& choice);

  Sampling sampling_;
  size_t vocab_;
  uint64_t drawn_ = 0;
  std::unordered_set<int32_t> seen_;            // prompt's and new ones, for repetition_penalty
  std::unordered_map<int32_t, int> generated_;  // times, for the other penalties
  std::vector<double> scores_;                  // [vocab], biased and penalized
  std::vector<double> tops_;                    // the largest of every few scores
  std::vector<double> ranked_;                  // for finding a score of a rank
  std::vector<int32_t> order_;  // the likeliest tokens, as far as they were asked for
};

// The n-th number of a seed, 0 <= u < 1: SplitMix64 (Steele, Lea, Flood 2014), its upper 53 bits.
double uniform(uint64_t seed, uint64_t n);

// e to the power of x, which is at most 0; the same bits on every machine.
double exponential(double x);

// The sum of exponential((score - top) * rate).
double sum_of_odds(const double* scores, size_t count, double top, double rate);

}  // namespace anybit
