// The shape of a tensor, without memory of its own.
#pragma once
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>

namespace anybit::ort {

constexpr size_t kMostDims = 8;

struct Dims {
  std::array<int64_t, kMostDims> dims{};
  size_t rank = 0;

  Dims() = default;
  Dims(std::initializer_list<int64_t> list) : rank(list.size()) {
    std::copy(list.begin(), list.end(), dims.begin());
  }

  bool operator==(const Dims& other) const {
    return rank == other.rank && std::equal(dims.begin(), dims.begin() + rank, other.dims.begin());
  }
  int64_t& back() { return dims[rank - 1]; }

  std::string text() const {
    std::string text = "[";
    for (size_t i = 0; i < rank; ++i) text += (i != 0 ? ", " : "") + std::to_string(dims[i]);
    return text + "]";
  }
};

}  // namespace anybit::ort
