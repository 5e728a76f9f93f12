// Philox4x32-10 of attnx/philox.h on vectors of counters, and what dropout makes of it (attnx/dropout.h).
#pragma once

#include "panel.h"

namespace attnx::cpu::ATTNX_ISA {

using Words = Vec<std::uint32_t>;

ATTNX_INLINE void multiply_wide(Words x, std::uint32_t factor, Words& high, Words& low) {
#if defined(__AVX512F__)
  const __m512i f = _mm512_set1_epi32(int(factor)), a = (__m512i)x;
  const __m512i even = _mm512_mul_epu32(a, f), odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), f);
  low = (Words)_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
  high = (Words)_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
#elif defined(__AVX2__)
  const __m256i f = _mm256_set1_epi32(int(factor)), a = (__m256i)x;
  const __m256i even = _mm256_mul_epu32(a, f), odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), f);
  low = (Words)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
  high = (Words)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
#else
  for (int i = 0; i < kLanes<std::uint32_t>; ++i) {
    const std::uint64_t product = std::uint64_t(x[i]) * factor;
    high[i] = std::uint32_t(product >> 32), low[i] = std::uint32_t(product);
  }
#endif
}

struct PhiloxVectors {
  Words word[4];
};

ATTNX_INLINE PhiloxVectors philox_vectors(PhiloxVectors counter, std::uint64_t key) {
  auto low_key = std::uint32_t(key), high_key = std::uint32_t(key >> 32);
  auto& c = counter.word;
  for (int round = 0; round < 10; ++round) {
    Words high0, low0, high1, low1;
    multiply_wide(c[0], 0xD2511F53, high0, low0);
    multiply_wide(c[2], 0xCD9E8D57, high1, low1);
    c[0] = high1 ^ c[1] ^ low_key;
    c[1] = low1;
    c[2] = high0 ^ c[3] ^ high_key;
    c[3] = low0;
    low_key += 0x9E3779B9;
    high_key += 0xBB67AE85;
  }
  return counter;
}

// The draws of one call.
struct Dropout {
  std::uint32_t kept = 256;  // bytes below it keep their weight
  std::uint64_t seed = 0;
  std::uint32_t offset = 0;

  explicit Dropout(const LogitTerms& terms) {
    if (terms.dropout == 0) return;
    kept = larger<std::uint32_t>(std::uint32_t(256 * (1 - terms.dropout) + 0.5), 1);
    seed = std::uint64_t(*terms.seed);
    offset = std::uint32_t(*terms.offset);
  }

  double factor() const { return 256.0 / kept; }

  // It writes to[keys][lanes] of a tile: `one` where the weight is kept, else 0. first_head is that of the sequence,
  // counted over the batch.
  template <class Sum>
  void fill(const Panel<Sum>& panel, std::int64_t first_head, std::int64_t key0, std::int64_t keys, Sum one,
            Sum* to) const {
    constexpr int kWidth = kPanelLanes<Sum>, kTogether = kLanes<std::uint32_t>;
    for (int lane = 0; lane < panel.vectors * kLanes<Sum>; lane += kTogether) {
      Words query, head;
      for (int i = 0; i < kTogether; ++i) {
        const int own = smaller(lane + i, kWidth - 1);
        query[i] = std::uint32_t(panel.query[own]);
        head[i] = std::uint32_t(first_head + panel.head[own]);
      }
      for (std::int64_t block = key0 / 64; block * 64 < key0 + keys; ++block)
        for (int pair = 0; pair < 4; ++pair) {
          const Words place = Words{} + std::uint32_t(block * 4 + pair);
          const PhiloxVectors bytes = philox_vectors({{place, query, head, Words{} + offset}}, seed);
          for (int n = 0; n < 16; ++n) {
            const std::int64_t key = block * 64 + n / 2 * 8 + pair * 2 + n % 2 - key0;
            if (key >= 0 && key < keys)
              store_kept(bytes.word[n / 4] >> std::uint32_t(n % 4 * 8) & 255u, one, to + key * kWidth + lane,
                         kWidth - lane);
          }
        }
    }
  }

 private:
  template <class Sum>
  ATTNX_INLINE void store_kept(Words bytes, Sum one, Sum* to, int most) const {
    if constexpr (sizeof(Sum) == sizeof bytes[0]) {
      store(to, bytes < kept ? splat(one) : Vec<Sum>{});
    } else {
      for (int i = 0; i < kLanes<std::uint32_t> && i < most; ++i) to[i] = bytes[i] < kept ? one : 0;
    }
  }
};

}  // namespace attnx::cpu::ATTNX_ISA
