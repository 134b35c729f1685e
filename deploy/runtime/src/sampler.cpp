// Chooses tokens; the header anybit/sampling.hpp says how.
#include "sampler.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <string>

#include "anybit/error.hpp"

namespace anybit {
namespace {

constexpr size_t kFirstSorted = 64;  // a draw rarely goes further down

std::string shown(double value) {
  char text[32];
  snprintf(text, sizeof text, "%g", value);
  return text;
}

void check(bool good, const char* field, double got, const std::string& expected, const char* fix) {
  if (!good) throw Error(field, "got " + shown(got) + ", expected " + expected, fix);
}

// Neither stops early, so that the compiler can compute several numbers at a time.
bool finite(const float* logits, size_t count) {
  constexpr uint32_t kExponent = 0x7f800000;
  uint32_t bad = 0;
  for (size_t i = 0; i < count; ++i) {
    uint32_t bits;
    memcpy(&bits, logits + i, sizeof bits);
    bad |= (bits & kExponent) == kExponent;
  }
  return bad == 0;
}

int32_t largest(const float* logits, size_t count) {
  constexpr size_t kLanes = 16;
  std::array<float, kLanes> lanes;
  lanes.fill(logits[0]);
  size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (size_t lane = 0; lane < kLanes; ++lane) {
      lanes[lane] = logits[i + lane] > lanes[lane] ? logits[i + lane] : lanes[lane];
    }
  }
  float best = *std::max_element(lanes.begin(), lanes.end());
  for (; i < count; ++i) best = std::max(best, logits[i]);
  return static_cast<int32_t>(std::find(logits, logits + count, best) - logits);
}

}  // namespace

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
  if (!finite(logits, vocab_)) {
    throw Error("logits", "got NaN or Inf, expected finite numbers",
                "Export with --dtype bfloat16 or float32, which hold larger numbers");
  }
  Choice choice;
  if (plain()) {
    choice.id = largest(logits, vocab_);
  } else {
    score(logits);
    order_.resize(vocab_);
    std::iota(order_.begin(), order_.end(), 0);
    sorted_ = 0;
    if (sampling_.temperature > 0) {
      choice.id = draw();
    } else {
      choice.id =
          static_cast<int32_t>(std::max_element(scores_.begin(), scores_.end()) - scores_.begin());
    }
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
}

// Sorts at least the first `count` of order_, the likeliest first and of equals the lowest id.
void Sampler::sort(size_t count) {
  count = std::min(count, vocab_);
  if (count <= sorted_) return;
  const auto before = [this](int32_t a, int32_t b) {
    return scores_[a] != scores_[b] ? scores_[a] > scores_[b] : a < b;
  };
  const auto from = order_.begin() + static_cast<ptrdiff_t>(sorted_);
  const auto to = order_.begin() + static_cast<ptrdiff_t>(count);
  if (to != order_.end()) std::nth_element(from, to, order_.end(), before);
  std::sort(from, to, before);
  sorted_ = count;
}

int32_t Sampler::draw() {
  const size_t most =
      sampling_.top_k > 0 ? std::min<size_t>(static_cast<size_t>(sampling_.top_k), vocab_) : vocab_;
  sort(sampling_.top_k > 0 ? most : kFirstSorted);
  const double top = scores_[order_[0]], temperature = sampling_.temperature;
  const auto odds = [&](int32_t id) { return std::exp((scores_[id] - top) / temperature); };
  // The i-th likeliest token.
  const auto token = [&](size_t i) {
    if (i >= sorted_) sort(4 * sorted_);
    return order_[i];
  };

  double total = 0;
  for (size_t i = 0; i < most; ++i) total += odds(order_[i]);
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
  const double top = *std::max_element(scores_.begin(), scores_.end());
  double sum = 0;
  for (const double score : scores_) sum += std::exp(score - top);
  const double all = top + std::log(sum);
  choice.logprob = static_cast<float>(scores_[choice.id] - all);
  const size_t count = std::min<size_t>(static_cast<size_t>(sampling_.logprobs), vocab_);
  sort(count);
  for (size_t i = 0; i < count; ++i) {
    choice.top.emplace_back(order_[i], static_cast<float>(scores_[order_[i]] - all));
  }
}

}  // namespace anybit
