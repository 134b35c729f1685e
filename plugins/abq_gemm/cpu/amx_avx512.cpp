// ABQGemm for machines with AMX: many tokens by tiles, all else as with AVX-512, whose flags it takes.
#include "core/cpu/has_tiles.h"
#if defined(__AVX512VNNI__) && defined(ANYBIT_HAS_TILES)
#define ANYBIT_SET amx
#define ANYBIT_TILES
#include "abq_gemm/cpu/gemm.h"

namespace anybit::cpu {

void abq_gemm_avx512(const GemmShape& shape, const GemmBuffers& buffers, const Parallel& parallel);

void abq_gemm_amx(const GemmShape& shape, const GemmBuffers& buffers, const Parallel& parallel) {
  const int64_t tokens = int64_t{shape.m} * amx::abq_digits(shape);
  if (tokens < amx::kTileTokens) return abq_gemm_avx512(shape, buffers, parallel);
  amx::abq_integer_gemm(shape, buffers, parallel);
}

}  // namespace anybit::cpu
#endif
