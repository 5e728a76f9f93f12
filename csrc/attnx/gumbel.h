// This draws Gumbel numbers, which turn the largest of some logits into a draw from their softmax: with each logit L_j
// gets g_j = -ln(-ln(1 - u_j)), the largest L_j / T + g_j is that of key j with probability exp(L_j / T) / sum (Gumbel,
// "Statistical Theory of Extreme Values", 1954; Maddison et al., "A* Sampling", NIPS 2014). The u_j are the same bits
// on the host, on the device and in attnx.reference; g_j is rounded as the logarithms are.
//
// One call of Philox gives four words, which are for the keys of a row that one thread holds in 16 keys where an
// accumulator of mma.sync (PTX ISA, "Matrix Fragments for mma.m16n8k16") lies in registers: two neighbours in each of
// two tiles of eight keys.
#pragma once

#include "attnx/philox.h"

namespace attnx {

struct GumbelDraw {
  std::uint64_t seed;
  std::uint32_t offset;

  // It returns the words for the keys 16 * keys16 + 8 * (n / 2) + 2 * pair + n % 2, for n from 0 to 3, of a query of a
  // sequence. pair is from 0 to 3, and head is that of the query, counted over the batch.
  ATTNX_HOST_DEVICE PhiloxWords words(std::uint32_t head, std::uint32_t query, std::uint32_t keys16,
                                      std::uint32_t pair) const {
    return philox({{keys16 * 4 + pair, query, head, offset}}, seed);
  }
};

// A word becomes u = min((word / 2 + 1/2) 2^-31, 1 - 2^-24), where word / 2 is rounded down and the rest to float.
// Small numbers u, which large draws come of, have all bits of a float.
inline constexpr float kUniformStep = 0x1p-31f, kUniformMost = 1 - 0x1p-24f;

}  // namespace attnx
