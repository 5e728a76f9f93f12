// Philox4x32-10 makes random words from a counter and a key, without state. The bits are the same on every backend. It
// comes from Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
#pragma once

#include <cstdint>

#include "attnx/host_device.h"

namespace attnx {

struct PhiloxWords {
  std::uint32_t word[4];
};

// The low word of the key is that of the paper's key[0].
ATTNX_HOST_DEVICE inline PhiloxWords philox(PhiloxWords counter, std::uint64_t key) {
  constexpr int kRounds = 10;
  std::uint32_t low = std::uint32_t(key), high = std::uint32_t(key >> 32);
  for (int round = 0; round < kRounds; ++round) {
    const auto [c0, c1, c2, c3] = counter.word;
    const std::uint64_t product0 = std::uint64_t(0xD2511F53) * c0, product1 = std::uint64_t(0xCD9E8D57) * c2;
    counter = {{std::uint32_t(product1 >> 32) ^ c1 ^ low, std::uint32_t(product1),
                std::uint32_t(product0 >> 32) ^ c3 ^ high, std::uint32_t(product0)}};
    low += 0x9E3779B9;   // the golden ratio
    high += 0xBB67AE85;  // sqrt(3) - 1
  }
  return counter;
}

}  // namespace attnx
