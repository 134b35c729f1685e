// fp16, bf16 and fp32 numbers in bytes: conversions of the self-test's own.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/host/params.h"

namespace selftest {

size_t size_of(int32_t dtype);  // bytes
float float_from_half(uint16_t half);
// Nearest fp16, half to even; NaN and infinity stay.
uint16_t half_from_float(float v);
// The number that `bytes` hold at element i, of type dtype.
float load(const std::vector<uint8_t>& bytes, size_t i, int32_t dtype);
void store(std::vector<uint8_t>& bytes, size_t i, int32_t dtype, float v);
// v rounded to dtype, too large numbers to the largest.
float rounded_to(float v, int32_t dtype);
// Distance of neighbouring numbers of type dtype, relative.
float epsilon_of(int32_t dtype);

}  // namespace selftest
