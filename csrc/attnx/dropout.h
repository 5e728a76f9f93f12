// This decides which weights dropout keeps. The bits are the same on the host, on the device and in attnx.reference.
//
// A weight is decided by a byte. One call of Philox gives 16 of them, which are for the 16 keys of a row that one
// thread holds in 64 keys where an accumulator of mma.sync (PTX ISA, "Matrix Fragments for mma.m16n8k16") lies in
// registers: two neighbours in each of eight tiles of eight keys. So no byte is drawn twice or thrown away there.
#pragma once

#include "attnx/philox.h"

namespace attnx {

// Bytes below this keep their weight, so that p is rounded to a multiple of 1/256, and at most 255/256. p is in [0, 1).
ATTNX_HOST_DEVICE constexpr std::uint32_t dropout_bytes_kept(double p) {
  const auto kept = std::uint32_t(256 * (1 - p) + 0.5);
  return kept < 1 ? 1 : kept;
}

// A kept weight counts this many times, so that the mean over all draws is exact for the rounded p.
ATTNX_HOST_DEVICE constexpr double dropout_factor(std::uint32_t kept) { return 256.0 / kept; }

struct DropoutDraw {
  std::uint64_t seed;
  std::uint32_t offset;

  // It returns the bytes for the keys 64 * keys64 + 8 * (n / 2) + 2 * pair + n % 2, for n from 0 to 15, of a query of a
  // sequence. pair is from 0 to 3, and head is that of the query, counted over the batch.
  ATTNX_HOST_DEVICE PhiloxWords bytes(std::uint32_t head, std::uint32_t query, std::uint32_t keys64,
                                      std::uint32_t pair) const {
    return philox({{keys64 * 4 + pair, query, head, offset}}, seed);
  }

  // It returns byte n of a call.
  ATTNX_HOST_DEVICE static std::uint32_t byte(const PhiloxWords& bytes, int n) {
    return bytes.word[n / 4] >> (n % 4 * 8) & 255;
  }

  // It tells about one weight, for passes that hold weights in another order.
  ATTNX_HOST_DEVICE bool keeps(std::uint32_t kept, std::uint32_t head, std::uint32_t query, std::int64_t key) const {
    const int n = int(key / 8 % 8 * 2 + key % 2);
    return byte(bytes(head, query, std::uint32_t(key / 64), std::uint32_t(key % 8 / 2)), n) < kept;
  }
};

}  // namespace attnx
