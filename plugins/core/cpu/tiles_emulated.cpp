// The tile instructions of tiles_emulated.h. In the library for tests only.
#include "core/cpu/tiles_emulated.h"

#if defined(ANYBIT_EMULATED_TILES)
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "core/host/params.h"

namespace anybit::cpu::emulated {
namespace {

constexpr int kTiles = 8, kMostRows = 16, kMostBytes = 64;  // palette 1

struct Tile {
  int rows, row_bytes;
  uint8_t bytes[kMostRows][kMostBytes];
};
struct Registers {
  bool configured;
  Tile tiles[kTiles];
};
thread_local Registers registers;

void require(bool right, const char* instruction, const char* fault) {
  if (right) return;
  std::fprintf(stderr, "%s: got %s, expected none\n", instruction, fault);
  std::abort();
}

Tile& tile_at(int tile, const char* instruction) {
  require(registers.configured, instruction, "tiles without a configuration (#UD)");
  require(tile >= 0 && tile < kTiles, instruction, "a tile beyond the palette (#UD)");
  Tile& found = registers.tiles[tile];
  require(found.rows > 0 && found.row_bytes > 0, instruction, "a tile without rows (#UD)");
  return found;
}

}  // namespace

void configure(const void* config) {
  const char* name = "ldtilecfg";
  uint8_t bytes[64];
  std::memcpy(bytes, config, sizeof bytes);
  require(bytes[0] <= 1, name, "an unknown palette (#GP)");
  std::memset(&registers, 0, sizeof registers);
  if (bytes[0] == 0) return;
  for (int i = 1; i < 16; ++i) require(bytes[i] == 0, name, "a reserved byte or a start row (#GP)");
  for (int i = 0; i < 16; ++i) {
    const int row_bytes = bytes[16 + 2 * i] | bytes[17 + 2 * i] << 8, rows = bytes[48 + i];
    require(i < kTiles || (rows == 0 && row_bytes == 0), name, "a tile beyond the palette (#GP)");
    require(rows <= kMostRows, name, "more than 16 rows (#GP)");
    require(row_bytes <= kMostBytes, name, "rows of more than 64 bytes (#GP)");
    require((rows == 0) == (row_bytes == 0), name, "rows without bytes, or bytes without rows");
    if (i >= kTiles) continue;
    registers.tiles[i].rows = rows;
    registers.tiles[i].row_bytes = row_bytes;
  }
  registers.configured = true;
}

void release() { std::memset(&registers, 0, sizeof registers); }

void zero(int tile) {
  Tile& t = tile_at(tile, "tilezero");
  std::memset(t.bytes, 0, sizeof t.bytes);
}

void load(int tile, const void* from, int64_t stride) {
  Tile& t = tile_at(tile, "tileloadd");
  std::memset(t.bytes, 0, sizeof t.bytes);
  for (int row = 0; row < t.rows; ++row) {
    std::memcpy(t.bytes[row], static_cast<const uint8_t*>(from) + row * stride,
                size_t(t.row_bytes));
  }
}

void store(int tile, void* to, int64_t stride) {
  const Tile& t = tile_at(tile, "tilestored");
  for (int row = 0; row < t.rows; ++row)
    std::memcpy(static_cast<uint8_t*>(to) + row * stride, t.bytes[row], size_t(t.row_bytes));
}

void multiply_add(int sums, int tokens, int weights) {
  const char* name = "tdpbsud";
  require(sums != tokens && sums != weights && tokens != weights, name, "a tile twice (#UD)");
  Tile& to = tile_at(sums, name);
  const Tile &a = tile_at(tokens, name), &b = tile_at(weights, name);
  require(to.row_bytes % 4 == 0 && a.row_bytes % 4 == 0 && b.row_bytes % 4 == 0, name,
          "rows that are not whole groups of four bytes (#UD)");
  require(to.rows == a.rows, name, "sums and tokens with other rows (#UD)");
  require(a.row_bytes / 4 == b.rows, name, "tokens and weights of other lengths (#UD)");
  require(to.row_bytes == b.row_bytes, name, "sums and weights with other columns (#UD)");
  for (int m = 0; m < to.rows; ++m) {
    for (int n = 0; n < to.row_bytes / 4; ++n) {
      uint32_t total;
      std::memcpy(&total, to.bytes[m] + 4 * n, 4);
      for (int k = 0; k < a.row_bytes; ++k)
        total += uint32_t(int8_t(a.bytes[m][k]) * int32_t(b.bytes[k / 4][4 * n + k % 4]));
      std::memcpy(to.bytes[m] + 4 * n, &total, 4);
    }
  }
}

}  // namespace anybit::cpu::emulated

// Tells anybit-selftest that this library is a simulation; there are no orders of threads.
ANYBIT_API void anybit_sim_set_seed(unsigned) {}
#endif
