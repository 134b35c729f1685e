// ABQGemm with int8 tensor cores: bit planes are put together to codes of one byte in
// registers, 4 codes per word.
//
// A word of each plane holds one bit of 32 codes. codes_from_planes() turns the words into 8
// registers, register s with the codes of bits s, s + 8, s + 16, s + 24: a few logic
// operations for 4 codes, because no bit moves further than it must. A lane's registers 2t and
// 2t + 1 are its share of k step t of the mma, so the order of k follows from which word a
// lane takes. A unit is kWords words of a row (32 * kWords k, all of one group), shared by the
// 4 lanes q of a fragment row:
//   kWords = 4: lane q takes word q, steps 0..3
//   kWords = 2: word q / 2, bits from 4 * (q % 2), steps 0, 1
//   kWords = 1: the word, bits from 2q, step 0
// k_of_slot() is the same in one formula; the token kernel writes the codes of the
// activations in that order.
#pragma once
#include "core/device/ptx.cuh"

namespace anybit {

// Words of a unit for groups of `group_words` words: the largest of 4, 2, 1 that divides it. A row
// of one group counts as padded to 4.
__host__ __device__ inline int unit_words(int group_words, int n_groups) {
  return n_groups == 1 || group_words % 4 == 0 ? 4 : group_words % 2 == 0 ? 2 : 1;
}

// The k, counted from the start of a row of padded groups, whose code lies
// at byte `slot` of the row.
__host__ __device__ inline int k_of_slot(int slot, int words) {
  const int unit = slot / (32 * words), in_unit = slot % (32 * words);
  const int step = in_unit / 32, half = in_unit / 16 % 2, q = in_unit / 4 % 4, byte = in_unit % 4;
  const int lanes_per_word = 4 / words;
  const int word = q / lanes_per_word;
  const int bit = q % lanes_per_word * 2 * words + 2 * step + half;
  return 32 * (unit * words + word) + 8 * byte + bit;
}

// Codes of up to kPlanes bits: byte i of out[s] = the code whose bits are bit 8i + s of each
// plane's word. kPlanes 2, 4 or 8.
template <int kPlanes>
__device__ inline void codes_from_planes(const uint32_t (&plane)[kPlanes], uint32_t (&out)[8]) {
  static_assert(kPlanes == 2 || kPlanes == 4 || kPlanes == 8, "planes are paired, then the pairs");
  uint32_t pair[kPlanes / 2][2];  // fields of 2 bits: of the even bit places, of the odd ones
  ANYBIT_UNROLL
  for (int j = 0; j < kPlanes / 2; ++j) {
    pair[j][0] = pick(plane[2 * j], plane[2 * j + 1] << 1, 0x55555555u);
    pair[j][1] = pick(plane[2 * j] >> 1, plane[2 * j + 1], 0x55555555u);
  }
  if constexpr (kPlanes == 2) {
    ANYBIT_UNROLL
    for (int s = 0; s < 8; ++s) out[s] = pair[0][s % 2] >> (s & ~1) & 0x03030303u;
  } else {
    uint32_t quad[kPlanes / 4][4];  // fields of 4 bits: of bit places c, c + 4, ...
    ANYBIT_UNROLL
    for (int j = 0; j < kPlanes / 4; ++j) {
      ANYBIT_UNROLL
      for (int odd = 0; odd < 2; ++odd) {
        quad[j][odd] = pick(pair[2 * j][odd], pair[2 * j + 1][odd] << 2, 0x33333333u);
        quad[j][odd + 2] = pick(pair[2 * j][odd] >> 2, pair[2 * j + 1][odd], 0x33333333u);
      }
    }
    ANYBIT_UNROLL
    for (int c = 0; c < 4; ++c) {
      if constexpr (kPlanes == 4) {
        out[c] = quad[0][c] & 0x0f0f0f0fu;
        out[c + 4] = quad[0][c] >> 4 & 0x0f0f0f0fu;
      } else {
        out[c] = pick(quad[0][c], quad[1][c] << 4, 0x0f0f0f0fu);
        out[c + 4] = pick(quad[0][c] >> 4, quad[1][c], 0x0f0f0f0fu);
      }
    }
  }
}

}  // namespace anybit
