// This decides which blocks of keys a block of queries visits in one round of probabilistic attention. The bits are the
// same on the host, on the device and in attnx.reference, as everything is integers but for one comparison and one
// division in IEEE double.
#pragma once

#include "attnx/philox.h"

namespace attnx {

// The grid is blocks of queries by blocks of keys, aligned bottom-right: query i stands at the position of key
// i + length_k - length_q, or of the nearest key there is.
struct BlockGrid {
  std::int64_t length_q, length_k;
  std::int64_t block_q, block_k;
  bool is_causal;

  ATTNX_HOST_DEVICE std::int64_t query_blocks() const { return (length_q + block_q - 1) / block_q; }
  ATTNX_HOST_DEVICE std::int64_t key_blocks() const { return (length_k + block_k - 1) / block_k; }
};

// Sequences may be shorter than the longest one, which the grid is for: AttentionParams says how. Their blocks count
// from their own first query and key.
struct SequenceLengths {
  const std::int32_t* cu_seqlens_q = nullptr;
  const std::int32_t *key_starts = nullptr, *key_ends = nullptr;

  ATTNX_HOST_DEVICE BlockGrid own(BlockGrid grid, std::int64_t sequence) const {
    if (cu_seqlens_q) grid.length_q = cu_seqlens_q[sequence + 1] - cu_seqlens_q[sequence];
    if (key_ends) grid.length_k = key_ends[sequence] - key_starts[sequence];
    return grid;
  }
};

// The diagonal blocks of a row of blocks are those of keys at which one of its queries stands. There is one of them
// where the lengths are aligned and block_q is at most block_k. All of them count as distance 0, which is always kept,
// so that no query that sees a key is left without one. Beyond the end of a shorter sequence a row has no blocks.
//
// The device counts in 32 bits, as divisions cost it more than the draws otherwise.
template <class Int = std::int64_t>
struct BlockRow {
  Int diagonal_begin, diagonal_end;
  Int candidates;  // the blocks [0, candidates) may take part: when causal, those that some query sees

  ATTNX_HOST_DEVICE BlockRow(const BlockGrid& grid, Int i) {
    const auto length_q = Int(grid.length_q), length_k = Int(grid.length_k);
    const auto block_q = Int(grid.block_q), block_k = Int(grid.block_k);
    const Int offset = length_k - length_q, last_key = length_k - 1;
    const Int end = (i + 1) * block_q < length_q ? (i + 1) * block_q : length_q;
    const auto block_at = [&](Int position) {
      return (position < 0 ? 0 : position < last_key ? position : last_key) / block_k;
    };
    const bool sees_none = length_k == 0 || i * block_q >= length_q || (grid.is_causal && end - 1 + offset < 0);
    diagonal_begin = sees_none ? 0 : block_at(i * block_q + offset);
    diagonal_end = sees_none ? 0 : block_at(end - 1 + offset) + 1;
    candidates = sees_none ? 0 : grid.is_causal ? diagonal_end : (length_k + block_k - 1) / block_k;
  }

  ATTNX_HOST_DEVICE Int distance(Int j) const {
    return j < diagonal_begin ? diagonal_begin - j : j < diagonal_end ? 0 : j - diagonal_end + 1;
  }
};

// All rounds are independent of each other, and so are all blocks of one.
struct SamplingRound {
  std::uint64_t seed;
  std::uint32_t offset;

  // It returns the word w that decides about block (i, j) of a head, which is counted over the batch. The word stands
  // for u = (w + 1/2) 2^-32.
  ATTNX_HOST_DEVICE std::uint32_t draw(std::int64_t head, std::int64_t i, std::int64_t j) const {
    return philox({{std::uint32_t(j), std::uint32_t(i), std::uint32_t(head), offset}}, seed).word[0];
  }
};

// This is the Bernoulli draw, which keeps a block where u < p.
ATTNX_HOST_DEVICE inline bool is_kept(std::uint32_t word, float p) { return (word + 0.5) * 0x1p-32 < double(p); }

// It returns -log2(u) in units of 2^-24, which it finds bit by bit, as no two libraries' logarithms agree to the last
// one.
ATTNX_HOST_DEVICE inline std::uint32_t exponential(std::uint32_t word) {
  constexpr int kFractionBits = 24;
  const std::uint64_t odd = 2 * std::uint64_t(word) + 1;  // u 2^33
  std::uint32_t exponent = 0;
  while (odd >> (exponent + 1)) ++exponent;
  std::uint64_t mantissa = (odd << (32 - exponent)) >> 1;  // from 1 to 2, in units of 2^-31
  std::uint32_t log = exponent;
  for (int bit = 0; bit < kFractionBits; ++bit) {
    mantissa = mantissa * mantissa >> 31;
    const auto two_or_more = std::uint32_t(mantissa >> 32);
    mantissa >>= two_or_more;
    log = 2 * log + two_or_more;
  }
  return (std::uint32_t(33) << kFractionBits) - log;
}

// Gumbel-top-m on log p is a race: a block arrives at a time that is exponential with rate p, and the first m are kept;
// of those that arrive together the ones with the lower index come first. p is above 0, as a block of p = 0 never
// comes.
ATTNX_HOST_DEVICE inline double arrival_time(std::uint32_t word, float p) { return exponential(word) / double(p); }

}  // namespace attnx
