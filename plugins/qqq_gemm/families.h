// The families of fast QQQGemm kernels, each in a .cu file of its own, so that they compile side by side.
#pragma once
#include "core/frame.h"
#include "qqq_gemm/config.h"
#include "qqq_gemm/int8.cuh"

namespace anybit {

// Kernel `kernel` of kQqqKernels on prepared tokens.
cudaError_t qqq_int8(int kernel, const QqqGemmArgs& p, const Split& split);

}  // namespace anybit
