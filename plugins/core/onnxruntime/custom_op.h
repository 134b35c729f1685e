// A low-bit GEMM as an ONNX Runtime custom op: the op folder names its inputs, custom_op.cpp does
// the rest.
//
// An op folder's onnxruntime.cpp fills one GemmOp and makes one static GemmRegistration of it.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "core/host/params.h"
#include "core/onnxruntime/api.h"
#include "core/onnxruntime/dims.h"

namespace anybit::ort {

// An input behind X: its field of GemmBuffers, and the exact type and shape that it must have.
struct InputSpec {
  const char* name;
  void (*bind)(GemmBuffers& buffers, const void* data);
  ElementType type;
  Dims dims;
};

struct GemmOp {
  const char* name;  // ONNX op_type, and that of its kernels in anybit_ops()
  // Types of the inputs that every node has, X's undefined; bias, gamma and what `inputs` adds may
  // follow, three at most.
  std::vector<ElementType> required;
  // without X, bias and gamma
  std::vector<InputSpec> (*inputs)(const GemmShape& shape);
};

// Declares the op for fp32, fp16 and bf16. One static object each.
struct GemmRegistration {
  explicit GemmRegistration(const GemmOp& op);
};

constexpr const char* kDomain = "anybit";
constexpr int kDomains = 256;  // kDomain, kDomain.v1, ...: what a model calls its schemes
constexpr const char* kPluginVersion = "1";  // of the nodes that these kernels run

// Kernels that the calling thread has made, for a caller that wants to know whether a session runs all
// of its custom nodes here: one that ONNX Runtime runs by its function body makes none.
ANYBIT_API int64_t anybit_kernels_made();

// Declares any op, in a domain and those below it that models use. Called from static objects. The
// pointer is a shared one because it remembers what it was made of: an op is deleted as that.
void add_declaration(const char* domain, std::shared_ptr<const CustomOp> op);

// Adds every declared op in every domain to a session's options; null, or what is wrong.
OrtStatus* register_ops(OrtSessionOptions* options, const OrtApiBase* base);

}  // namespace anybit::ort
