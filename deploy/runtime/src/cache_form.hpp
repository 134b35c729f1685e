// The inputs and outputs of a decoder, whoever computes it, and how it keeps its cache.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "artifact.hpp"
#include "core/onnxruntime/api.h"

namespace anybit {

// An input or output.
struct TensorType {
  ort::ElementType type = ort::kUndefined;
  std::vector<int64_t> dims;  // -1 where any size goes
};
using Tensors = std::map<std::string, TensorType>;

// 0 of one that no tensor here has.
size_t bytes_of(ort::ElementType type);

// A layer's keys or values, [batch, heads, tokens, width].
struct CacheTensor {
  static constexpr size_t kTokens = 2;  // the dimension

  std::string past, present;
  ort::ElementType type;
  std::vector<int64_t> dims;

  size_t bytes(int64_t tokens) const;  // of one slot
  std::vector<int64_t> shape(int64_t rows, int64_t tokens) const;
};

// How a decoder keeps its cache, and whether it computes the logits of chosen tokens alone.
struct CacheForm {
  bool is_static = false;
  int capacity = 0;        // of a static cache
  size_t token_bytes = 0;  // of the cache of one token, all layers
  bool picks_logits = false;
  std::vector<CacheTensor> tensors;
};

// where, fix: for messages about the file that has these.
//
// Throws Error: they are other than a decoder's, or not what the description says.
CacheForm cache_form(const Tensors& inputs, const Tensors& outputs, const Description& description,
                     const std::string& where, const std::string& fix);

}  // namespace anybit
