// This makes the draws of attnx/gumbel.h on vectors of rows.
#pragma once

#include "attnx/gumbel.h"
#include "math.h"
#include "random.h"

namespace attnx::cpu::ATTNX_ISA {

// ln(1 - u) is ln(w) u / (1 - w) for w = 1 - u, rounded: the quotient makes up for the rounding (Goldberg, "What Every
// Computer Scientist Should Know About Floating-Point Arithmetic", theorem 4).
ATTNX_INLINE Vec<float> gumbel(Words words) {
  const Vec<float> half = __builtin_convertvector(bit_cast<Vec<std::int32_t>>(words >> 1), Vec<float>);
  const Vec<float> u = at_most((half + 0.5f) * kUniformStep, kUniformMost), w = 1.0f - u;
  const Vec<float> exponential = w == 1.0f ? u : log(w) * u / (w - 1.0f);
  return -log(exponential);
}

// It writes the draws of a tile, times a factor, to[keys][lanes], in groups of 16 keys from the first: the tile begins
// at a multiple of 16, and `to` has room for a multiple of it. first_head is that of the sequence, counted over the
// batch.
template <class Sum>
inline void fill_gumbel(const GumbelDraw& draw, const Panel<Sum>& panel, std::int64_t first_head, const KeyTile& tile,
                        Sum factor, Sum* to) {
  constexpr int kWidth = kPanelLanes<Sum>, kTogether = kLanes<std::uint32_t>;
  for (int lane = 0; lane < panel.vectors * kLanes<Sum>; lane += kTogether) {
    Words query, head;
    for (int i = 0; i < kTogether; ++i) {
      const int own = smaller(lane + i, kWidth - 1);
      query[i] = std::uint32_t(panel.query[own]);
      head[i] = std::uint32_t(first_head + panel.head[own]);
    }
    for (std::int64_t key = 0; key < tile.count; key += 16)
      for (int pair = 0; pair < 4; ++pair) {
        const Words place = Words{} + std::uint32_t((tile.first + key) / 16 * 4 + pair);
        const PhiloxVectors words = philox_vectors({{place, query, head, Words{} + draw.offset}}, draw.seed);
        for (int n = 0; n < 4; ++n) {
          Sum* const row = to + (key + n / 2 * 8 + pair * 2 + n % 2) * kWidth + lane;
          const Vec<float> g = gumbel(words.word[n]);
          for (int i = 0; i < kTogether && lane + i < kWidth; ++i) row[i] = factor * Sum(g[i]);
        }
      }
  }
}

}  // namespace attnx::cpu::ATTNX_ISA
