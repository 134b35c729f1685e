// The function that ONNX Runtime calls when the library is registered with a session's options.
#include "core/host/params.h"
#include "core/onnxruntime/custom_op.h"

ANYBIT_API OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  return anybit::ort::register_ops(options, base);
}
