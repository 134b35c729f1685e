// AMX's tile instructions in plain C++, bit for bit, with the faults that a processor would raise;
// core/cpu/tiles.h says what for.
#pragma once
#include <cstdint>

namespace anybit::cpu::emulated {

// Each ends the program, with a line that names the instruction and what was wrong, where a processor
// raises a fault. Tiles are the calling thread's.
void configure(const void* config);  // 64 bytes
void release();
void zero(int tile);
void load(int tile, const void* from, int64_t stride);
void store(int tile, void* to, int64_t stride);
void multiply_add(int sums, int tokens, int weights);  // TDPBSUD

}  // namespace anybit::cpu::emulated
