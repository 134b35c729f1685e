// How the next token is chosen from the model's logits.
#pragma once
#include <cstdint>
#include <utility>
#include <vector>

#pragma GCC visibility push(default)
namespace anybit {

// How tokens are chosen. The steps are taken in the order of the fields: bias and penalties change
// the logits; at temperature 0 the largest is taken (the lowest token id of equals), else the
// logits are divided by the temperature and one token is drawn among the top_k largest, of these
// among the fewest whose odds sum up to top_p, of these among those at least min_p times as likely
// as the best.
//
// The draw for the n-th new token (n = 0, 1 ...) depends on the seed and n only. In whole numbers of
// 64 bits, which wrap around:
//
//   z = seed + (n + 1) * 0x9e3779b97f4a7c15
//   z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9
//   z = (z ^ z >> 27) * 0x94d049bb133111eb
//   u = ((z ^ z >> 31) >> 11) * 2^-53
//
// which is the n-th number of SplitMix64 from this seed (Steele, Lea, Flood 2014). The candidates are
// gone through from the likeliest to the unlikeliest (of equals the lowest id first), and the first at
// which the sum of odds exceeds u times their whole sum is taken. So a seed gives the same tokens
// whatever else runs.
struct Sampling {
  // Added to the logits of these tokens.
  std::vector<std::pair<int32_t, float>> logit_bias;
  // Divides the positive and multiplies the negative logits of tokens that the text has already,
  // the prompt's too; 0.01 to 100, 1 changes nothing.
  float repetition_penalty = 1;
  // Taken off the logits of tokens that were generated already; -2 to 2.
  float presence_penalty = 0;
  // Taken off the logits of generated tokens once for each time that they were; -2 to 2.
  float frequency_penalty = 0;
  // 0 takes the best token, 1 draws from the model's own odds; at most 100.
  float temperature = 0;
  // Draw among the K best only; 0 is all.
  int top_k = 0;
  // Draw among the fewest tokens whose odds sum up to this; above 0, 1 is all.
  float top_p = 1;
  // Draw among tokens at least this times as likely as the best; 0 to 1, 0 is all.
  float min_p = 0;
  // Of the draws.
  uint64_t seed = 0;
  // How many of the best tokens are reported with each token (Token::top), 0 to 20, besides the
  // log probability of the token itself; -1 reports neither and costs nothing.
  int logprobs = -1;
};

}  // namespace anybit
#pragma GCC visibility pop
