// Rows of a cache of few bits, as plugins/cached_attention/codes.py stores them. Compiled once for each
// instruction set.
#pragma once
#include "cached_attention/cpu/vector.h"
#include "core/cpu/tokens.h"

namespace anybit::cpu {
namespace ANYBIT_SET {

constexpr uint64_t kLowBits = 0x0101010101010101;  // of eight bytes
constexpr uint8_t kByteOffset = 128;

// Bit i of a byte in byte i of a word.
ANYBIT_INLINE uint64_t spread(uint8_t byte) {
#if defined(__BMI2__)
  return _pdep_u64(byte, kLowBits);
#else
  // The products lie beside each other, those of the last bits first.
  return __builtin_bswap64(((byte * uint64_t{0x8040201008040201}) >> 7) & kLowBits);
#endif
}

// The other way round, of words whose bytes are 0 or 1.
ANYBIT_INLINE uint8_t gathered(uint64_t word) {
  return uint8_t((word * uint64_t{0x0102040810204080}) >> 56);
}

// Codes and scales of one row of `width` numbers, a multiple of 8.
template <class T>
inline void store_row(const T* row, int width, int bits, int8_t* packed, float* scales) {
  const NormedToken<T> token(row, nullptr, width, 0);
  const TokenQuant q = token_quant(token, width, bits, false);
  scales[0] = q.scale, scales[1] = q.zero;
  alignas(64) float v[kElements];
  for (int first = 0; first < width; first += kElements) {
    const int count = smaller(kElements, width - first);
    token.read(first, count, v);
    for (int i = 0; i < count; i += 8) {
      uint64_t codes = 0;
      for (int j = 0; j < 8; ++j) {
        const float code = rounded(v[i + j] * q.inverse) + q.zero;
        const float inside = code < q.lo ? q.lo : code > q.hi ? q.hi : code;
        const float kept = q.finite ? inside : 0.0f;  // a row with a NaN has a NaN scale
        codes |= uint64_t(uint8_t(int(kept - q.lo))) << 8 * j;
      }
      for (int bit = 0; bit < bits; ++bit) {
        const uint8_t byte = gathered(codes >> bit & kLowBits);
        packed[bit * (width / 8) + (first + i) / 8] = int8_t(byte ^ kByteOffset);
      }
    }
  }
}

// What a row stands for, rounded to T.
template <class T>
inline void load_row(const int8_t* packed, const float* scales, int width, int bits, float* to) {
  const float scale = scales[0], zero = scales[1] + float(1 << (bits - 1));
  for (int i = 0; i < width; i += 8) {
    uint64_t codes = 0;
    for (int bit = 0; bit < bits; ++bit)
      codes |= spread(uint8_t(packed[bit * (width / 8) + i / 8]) ^ kByteOffset) << bit;
    uint8_t bytes[8];
    std::memcpy(bytes, &codes, sizeof bytes);
    for (int j = 0; j < 8; ++j) to[i + j] = (float(bytes[j]) - zero) * scale;
  }
  for (int i = 0; i < width; ++i) {
    const float most = kLargest<T>;  // a finite overflow stays finite, as in the body
    to[i] = to[i] > most ? most : to[i] < -most ? -most : to[i];
  }
  round_floats<T>(to, width);
}

}  // namespace ANYBIT_SET
}  // namespace anybit::cpu
