// QQQGemm for machines with AMX: many tokens by tiles, all else as with AVX-512, whose flags it takes.
#include "core/cpu/has_tiles.h"
#if defined(__AVX512VNNI__) && defined(ANYBIT_HAS_TILES)
#define ANYBIT_SET amx
#define ANYBIT_TILES
#include "qqq_gemm/cpu/gemm.h"

namespace anybit::cpu {

void qqq_gemm_avx512(const GemmShape& shape, const GemmBuffers& buffers, const Parallel& parallel);

void qqq_gemm_amx(const GemmShape& shape, const GemmBuffers& buffers, const Parallel& parallel) {
  if (shape.m < amx::kTileTokens) return qqq_gemm_avx512(shape, buffers, parallel);
  amx::qqq_gemm(shape, buffers, parallel);
}

}  // namespace anybit::cpu
#endif
