// What the ONNX file says of itself, so that its memory can be planned before it is opened.
#pragma once
#include <cstddef>
#include <filesystem>

#include "cache_form.hpp"

namespace anybit::ort {

struct Graph {
  Tensors inputs, outputs;
  // Bytes of the copies in fp32 that ONNX Runtime makes of the float matrices of its MatMul and Gemm
  // nodes: it converts, transposes or packs each as it opens the file.
  size_t copied = 0;
};

// Reads an ONNX file, but for the weights beside it.
//
// Throws Error: it cannot be read, or is none.
Graph read_graph(const std::filesystem::path& path);

}  // namespace anybit::ort
