// AMX's tile registers and products of int8 tiles, for the set "amx".
//
// A tile has up to 16 rows of up to 64 bytes. A product adds to the int32 [16, 16] of one tile the
// int8 codes of 16 tokens [16, 64] times the unsigned codes of 16 output channels, of which row r has
// input channels 4 r to 4 r + 3 of each, [64 / 4][16][4]: half of a panel (dot.h), every second 64
// bytes of it.
//
// The instructions are written out, since the compiler's own intrinsics say nothing of the memory that
// they read and write (GCC 12) and want flags that older compilers lack. With ANYBIT_EMULATED_TILES
// plain C++ stands in for them, which does what Intel's manual (volume 2, TILELOADD, TDPBSUD ...) says
// and ends the program where a processor would raise a fault.
#pragma once
#include "core/cpu/floats.h"

#if defined(ANYBIT_EMULATED_TILES)
#include "core/cpu/tiles_emulated.h"
#endif

namespace anybit::cpu {
namespace ANYBIT_SET {

constexpr int kTileTokens = 16;  // fewer than fill a tile are left to other kernels
constexpr int kTileRows = 16;
constexpr int kTileBytes = 64;  // of a row

// What LDTILECFG reads.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};  // of 8 tiles; the others stay 0
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

#if !defined(ANYBIT_EMULATED_TILES)

ANYBIT_INLINE void tile_configure(const TileConfig& config) {
  asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
}
ANYBIT_INLINE void tile_release() { asm volatile("tilerelease" ::: "memory"); }

template <int kTile>
ANYBIT_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kTile>
ANYBIT_INLINE void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(kTile), "r"(from), "r"(stride) : "memory");
}
template <int kTile>
ANYBIT_INLINE void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(kTile), "r"(to), "r"(stride) : "memory");
}
// kSums += signed codes of kTokens times unsigned codes of kWeights.
template <int kSums, int kTokens, int kWeights>
ANYBIT_INLINE void tile_multiply_add() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kTokens), "i"(kWeights));
}

#else

ANYBIT_INLINE void tile_configure(const TileConfig& config) { emulated::configure(&config); }
ANYBIT_INLINE void tile_release() { emulated::release(); }
template <int kTile>
ANYBIT_INLINE void tile_zero() {
  emulated::zero(kTile);
}
template <int kTile>
ANYBIT_INLINE void tile_load(const void* from, int64_t stride) {
  emulated::load(kTile, from, stride);
}
template <int kTile>
ANYBIT_INLINE void tile_store(void* to, int64_t stride) {
  emulated::store(kTile, to, stride);
}
template <int kSums, int kTokens, int kWeights>
ANYBIT_INLINE void tile_multiply_add() {
  emulated::multiply_add(kSums, kTokens, kWeights);
}

#endif

// Tiles 0 to 3 for sums, 4 and 5 for tokens, 6 and 7 for weights, as long as it lives: a thread that
// has tiles pays for them at every switch.
//
// steps: 4 input channels each, of a tile of tokens or weights; 16 fill it.
struct TileScope {
  ANYBIT_INLINE explicit TileScope(int steps) {
    TileConfig config;
    for (int tile = 0; tile < 8; ++tile) {
      config.row_bytes[tile] = uint16_t(tile == 4 || tile == 5 ? 4 * steps : kTileBytes);
      config.rows[tile] = uint8_t(tile >= 6 ? steps : kTileRows);
    }
    tile_configure(config);
  }
  ANYBIT_INLINE ~TileScope() { tile_release(); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

}  // namespace ANYBIT_SET
}  // namespace anybit::cpu
