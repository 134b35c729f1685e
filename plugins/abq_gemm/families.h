// The families of fast ABQGemm kernels, each in a .cu file of its own, so that they compile side by side.
#pragma once
#include "abq_gemm/config.h"
#include "abq_gemm/int8.cuh"
#include "core/frame.h"

namespace anybit {

// Row `tile` of kAbqInt8Tiles on prepared tokens.
cudaError_t abq_int8(const AbqGemmArgs& p, const AbqForm& form, int tile, const Split& split);

}  // namespace anybit
