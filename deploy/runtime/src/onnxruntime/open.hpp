// Opens the ONNX file of an artifact.
#pragma once
#include "artifact.hpp"
#include "opened.hpp"

namespace anybit::ort {

// Throws Error: a file is missing or damaged, ONNX Runtime or the kernels are missing or refuse the
// graph, or there is too little memory.
Opened open(const Artifact& artifact, const LoadOptions& options);

}  // namespace anybit::ort
