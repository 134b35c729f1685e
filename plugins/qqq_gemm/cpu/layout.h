// How QQQGemm's weights and tokens lie.
#pragma once
#include "core/cpu/gemm.h"

namespace anybit::cpu {
namespace ANYBIT_SET {

constexpr int kQqqRow = 16;    // input channels of a row of packed words
constexpr int kQqqBlock = 64;  // output channels of a block of it
constexpr int kQqqBlockBytes = 512;
constexpr int kQqqFewTokens = 7;  // for which weights are not unpacked into panels

// Group scales are part of the weights, so that a token has one sum.
ANYBIT_INLINE TokenLayout qqq_layout(const GemmShape& s) { return token_layout(s.k, 1, kQqqRow); }

}  // namespace ANYBIT_SET
}  // namespace anybit::cpu
