// What the ONNX file says of itself, so that its memory can be planned before it is opened.
#pragma once
#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "core/onnxruntime/api.h"

namespace anybit::ort {

// An input or output of a graph.
struct TensorType {
  ElementType type = kUndefined;
  std::vector<int64_t> dims;  // -1 where any size goes
};

struct Graph {
  std::map<std::string, TensorType> inputs, outputs;
  // Bytes of the copies in fp32 that ONNX Runtime makes of the float matrices of its MatMul and Gemm
  // nodes: it converts, transposes or packs each as it opens the file.
  size_t copied = 0;
};

// Reads an ONNX file, but for the weights beside it.
//
// Throws Error: it cannot be read, or is none.
Graph read_graph(const std::filesystem::path& path);

}  // namespace anybit::ort
