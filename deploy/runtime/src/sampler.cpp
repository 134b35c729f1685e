// Chooses tokens; the header anybit/sampling.hpp says how.
#include "sampler.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <string>

#include "anybit/error.hpp"

namespace anybit {
namespace {

constexpr size_t kFirstSorted = 64;  // a draw rarely goes further down
constexpr size_t kTopOf = 16;        // scores that have one of the tops

std::string shown(double value) {
  char text[32];
  snprintf(text, sizeof text, "%g", value);
  return text;
}

void check(bool good, const char* field, double got, const std::string& expected, const char* fix) {
  if (!good) throw Error(field, "got " + shown(got) + ", expected " + expected, fix);
}

// Of the registers that every x86-64 and every 64-bit ARM has.
typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
constexpr size_t kLanes = 4, kBlock = 256 * kLanes;

// The largest number and the lowest id of equals; -1 where one is NaN or Inf. The logits are read
// once, and the block that has it again, from the nearest cache.
int32_t largest(const float* logits, size_t count) {
  constexpr int32_t kExponent = 0x7f800000;
  float best = -std::numeric_limits<float>::infinity();
  size_t from = 0;  // of its block
  bool good = true;
  Ints odd{};  // lanes with a number that is none
  for (size_t first = 0; first < count; first += kBlock) {
    const size_t last = std::min(first + kBlock, count);
    Floats most = Floats{} + best;
    size_t i = first;
    for (; i + kLanes <= last; i += kLanes) {
      Floats next;
      Ints bits;
      memcpy(&next, logits + i, sizeof next);
      memcpy(&bits, logits + i, sizeof bits);
      odd |= (bits & kExponent) == kExponent;
      most = next > most ? next : most;
    }
    float top = best;
    for (size_t lane = 0; lane < kLanes; ++lane) top = std::max(top, most[lane]);
    for (; i < last; ++i) {
      good = good && std::isfinite(logits[i]);
      top = std::max(top, logits[i]);
    }
    if (top > best) {
      best = top;
      from = first;
    }
  }
  for (size_t lane = 0; lane < kLanes; ++lane) good = good && odd[lane] == 0;
  if (!good) return -1;
  return static_cast<int32_t>(std::find(logits + from, logits + count, best) - logits);
}

typedef double Doubles __attribute__((vector_size(16)));
typedef uint64_t Longs __attribute__((vector_size(16)));
constexpr size_t kPair = 2;

// e to the power of numbers up to 0, within 4e-16 of it: 2^k e^r with |r| <= ln 2 / 2, and e^r by the
// first terms of its series. The library's own takes one number at a time, and not every version of it
// gives the same bits. Below -700, where nothing is left of a sum of odds, it gives e^-700.
Doubles exponential(Doubles x) {
  constexpr double kShift = 0x1.8p52;  // added, it leaves a number's whole part in the lowest bits
  constexpr double kHigh = 0x1.62e42fefa38p-1, kLow = 0x1.ef35793c7673p-45;  // of ln 2
  constexpr double kTerms[] = {1.0 / 479001600,
                               1.0 / 39916800,
                               1.0 / 3628800,
                               1.0 / 362880,
                               1.0 / 40320,
                               1.0 / 5040,
                               1.0 / 720,
                               1.0 / 120,
                               1.0 / 24,
                               1.0 / 6,
                               1.0 / 2,
                               1,
                               1};
  const Doubles least = Doubles{} - 700;
  x = x > least ? x : least;
  const Doubles shifted = x * 0x1.71547652b82fep0 + kShift, whole = shifted - kShift;
  const Doubles rest = (x - whole * kHigh) - whole * kLow;
  Doubles sum{};
  for (const double term : kTerms) sum = sum * rest + term;
  return reinterpret_cast<Doubles>(reinterpret_cast<Longs>(sum) +
                                   (reinterpret_cast<Longs>(shifted) << 52));
}

}  // namespace

double exponential(double x) { return exponential(Doubles{x, x})[0]; }

double sum_of_odds(const double* scores, size_t count, double top, double rate) {
  Doubles sums[2] = {};
  size_t i = 0;
  for (; i + 2 * kPair <= count; i += 2 * kPair) {
    for (size_t part = 0; part < 2; ++part) {
      Doubles next;
      memcpy(&next, scores + i + part * kPair, sizeof next);
      sums[part] += exponential((next - top) * rate);
    }
  }
  double sum = (sums[0][0] + sums[0][1]) + (sums[1][0] + sums[1][1]);
  for (; i < count; ++i) sum += exponential((scores[i] - top) * rate);
  return sum;
}

void check_sampling(const Sampling& s, int vocab) {
  check(s.temperature >= 0 && s.temperature <= 100, "temperature", s.temperature, "0 to 100",
        "Give such a number; 0 takes the best token, 1 the model's own odds");
  check(s.top_k >= 0, "top_k", s.top_k, "0 or more", "Give such a number; 0 is all tokens");
  check(s.top_p > 0 && s.top_p <= 1, "top_p", s.top_p, "more than 0 and at most 1",
        "Give such a number; 1 draws among all tokens");
  check(s.min_p >= 0 && s.min_p <= 1, "min_p", s.min_p, "0 to 1",
        "Give such a number; 0 draws among all tokens");
  check(s.repetition_penalty >= 0.01f && s.repetition_penalty <= 100, "repetition_penalty",
        s.repetition_penalty, "0.01 to 100", "Give such a number; 1 changes nothing");
  check(s.presence_penalty >= -2 && s.presence_penalty <= 2, "presence_penalty", s.presence_penalty,
        "-2 to 2", "Give such a number; 0 changes nothing");
  check(s.frequency_penalty >= -2 && s.frequency_penalty <= 2, "frequency_penalty",
        s.frequency_penalty, "-2 to 2", "Give such a number; 0 changes nothing");
  check(s.logprobs >= -1 && s.logprobs <= 20, "logprobs", s.logprobs, "-1 to 20",
        "Give such a number; -1 reports none");
  for (const auto& [id, bias] : s.logit_bias) {
    check(id >= 0 && id < vocab, "logit_bias", id, "a token of 0 to " + std::to_string(vocab - 1),
          "Give ids of the model's own tokens");
    check(bias >= -100 && bias <= 100, "logit_bias", bias, "-100 to 100",
          "Give such a number; 0 changes nothing");
  }
}

double uniform(uint64_t seed, uint64_t n) {
  uint64_t z = seed + n * 0x9e3779b97f4a7c15 + 0x9e3779b97f4a7c15;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  z ^= z >> 31;
  return static_cast<double>(z >> 11) * 0x1p-53;
}

Sampler::Sampler(Sampling sampling, int vocab, const std::vector<int32_t>& prompt)
    : sampling_(std::move(sampling)), vocab_(static_cast<size_t>(vocab)) {
  if (sampling_.repetition_penalty != 1) seen_.insert(prompt.begin(), prompt.end());
}

bool Sampler::plain() const {
  return sampling_.logit_bias.empty() && sampling_.repetition_penalty == 1 &&
         sampling_.presence_penalty == 0 && sampling_.frequency_penalty == 0 &&
         sampling_.temperature == 0 && sampling_.logprobs < 0;
}

Choice Sampler::choose(const float* logits) {
  Choice choice;
  choice.id = largest(logits, vocab_);
  if (choice.id < 0) {
    throw Error("logits", "got NaN or Inf, expected finite numbers",
                "Export with --dtype bfloat16 or float32, which hold larger numbers");
  }
  if (!plain()) {
    score(logits);
    order_.clear();
    sort(1);
    choice.id = sampling_.temperature > 0 ? draw() : order_[0];
    if (sampling_.logprobs >= 0) report(choice);
  }
  if (sampling_.presence_penalty != 0 || sampling_.frequency_penalty != 0) ++generated_[choice.id];
  if (sampling_.repetition_penalty != 1) seen_.insert(choice.id);
  return choice;
}

void Sampler::score(const float* logits) {
  scores_.assign(logits, logits + vocab_);
  for (const auto& [id, bias] : sampling_.logit_bias) scores_[id] += bias;
  const double repetition = sampling_.repetition_penalty;
  for (const int32_t id : seen_) {
    scores_[id] = scores_[id] < 0 ? scores_[id] * repetition : scores_[id] / repetition;
  }
  for (const auto& [id, times] : generated_) {
    scores_[id] -= sampling_.presence_penalty + double(sampling_.frequency_penalty) * times;
  }
  tops_.clear();
  for (size_t first = 0; first < vocab_; first += kTopOf) {
    const auto from = scores_.begin() + static_cast<ptrdiff_t>(first);
    tops_.push_back(
        *std::max_element(from, from + static_cast<ptrdiff_t>(std::min(kTopOf, vocab_ - first))));
  }
}

// Makes order_ all tokens down to some score, at least `count` of them, the likeliest first and of
// equals the lowest id. As many blocks as are wanted have a best score, and the least of the best of
// these is such a score: only in a few blocks anything is looked at.
void Sampler::sort(size_t count) {
  count = std::min(count, vocab_);
  if (count <= order_.size()) return;
  double least = -std::numeric_limits<double>::infinity();
  if (count < vocab_) {
    ranked_ = count <= tops_.size() ? tops_ : scores_;
    const auto last = ranked_.begin() + static_cast<ptrdiff_t>(count - 1);
    std::nth_element(ranked_.begin(), last, ranked_.end(), std::greater<>());
    least = *last;
  }
  order_.clear();
  for (size_t block = 0; block < tops_.size(); ++block) {
    if (tops_[block] < least) continue;
    for (size_t i = block * kTopOf; i < std::min((block + 1) * kTopOf, vocab_); ++i) {
      if (scores_[i] >= least) order_.push_back(static_cast<int32_t>(i));
    }
  }
  std::sort(order_.begin(), order_.end(), [this](int32_t a, int32_t b) {
    return scores_[a] != scores_[b] ? scores_[a] > scores_[b] : a < b;
  });
}

int32_t Sampler::draw() {
  const size_t most =
      sampling_.top_k > 0 ? std::min<size_t>(static_cast<size_t>(sampling_.top_k), vocab_) : vocab_;
  sort(sampling_.top_k > 0 ? most : kFirstSorted);
  const double top = scores_[order_[0]], rate = 1 / double(sampling_.temperature);
  const auto odds = [&](int32_t id) { return exponential((scores_[id] - top) * rate); };
  // The i-th likeliest token.
  const auto token = [&](size_t i) {
    if (i >= order_.size()) sort(4 * order_.size());
    return order_[i];
  };

  double total = 0;
  if (most < vocab_) {
    for (size_t i = 0; i < most; ++i) total += odds(order_[i]);
  } else {
    total = sum_of_odds(scores_.data(), vocab_, top, rate);
  }
  size_t count = most;
  if (sampling_.top_p < 1) {
    const double wanted = double(sampling_.top_p) * total;
    total = 0;
    for (count = 0; count < most && total < wanted; ++count) total += odds(token(count));
  }
  if (sampling_.min_p > 0) {
    total = 0;
    size_t likely = 0;
    for (; likely < count; ++likely) {
      const double one = odds(token(likely));
      if (one < sampling_.min_p) break;
      total += one;
    }
    count = likely;
  }
  const double wanted = uniform(sampling_.seed, drawn_++) * total;
  double sum = 0;
  for (size_t i = 0; i < count; ++i) {
    sum += odds(token(i));
    if (sum > wanted) return order_[i];
  }
  return token(count - 1);  // rounding
}

void Sampler::report(Choice& choice) {
  const double top = scores_[order_[0]];
  const double all = top + std::log(sum_of_odds(scores_.data(), vocab_, top, 1));
  choice.logprob = static_cast<float>(scores_[choice.id] - all);
  const size_t count = std::min<size_t>(static_cast<size_t>(sampling_.logprobs), vocab_);
  sort(count);
  for (size_t i = 0; i < count; ++i) {
    choice.top.emplace_back(order_[i], static_cast<float>(scores_[order_[i]] - all));
  }
}

}  // namespace anybit
