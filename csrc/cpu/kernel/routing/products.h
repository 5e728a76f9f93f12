// Products of normalised rows and centroids, a tile at a time: tokens by rows, centroids on the lanes.
#pragma once

#include "../arena.h"
#include "../gemm.h"
#include "../rows.h"
#include "../units.h"

namespace attnx::cpu::ATTNX_ISA {

// LayerNorm without scale and bias, eps 1e-5 as torch's default. A NaN or an infinity makes the whole row NaN.
template <class Sum>
inline void normalise(Sum* x, std::int64_t n) {
  const auto total = [&](auto term) {
    Vec<Sum> sums = {};
    std::int64_t d = 0;
    for (; d + kLanes<Sum> <= n; d += kLanes<Sum>) sums += term(load(x + d));
    Sum sum = 0;
    for (int i = 0; i < kLanes<Sum>; ++i) sum += sums[i];
    for (; d < n; ++d) sum += term(splat(x[d]))[0];
    return sum;
  };
  const Sum mean = total([](Vec<Sum> v) { return v; }) / Sum(n);
  const Sum variance = total([&](Vec<Sum> v) { return (v - mean) * (v - mean); }) / Sum(n);
  const Sum factor = 1 / Sum(__builtin_sqrt(double(variance + Sum(1e-5))));
  for (std::int64_t d = 0; d < n; ++d) x[d] = (x[d] - mean) * factor;
}

// Numbers in the order of their ranks, which are integers; NaN is below all.
template <class Sum>
ATTNX_INLINE Mask<Sum> rank(Vec<Sum> x) {
  constexpr int kShift = 8 * int(sizeof(Sum)) - 1;
  constexpr auto kLargest = MaskInt<Sum>(~(std::uint64_t(1) << kShift));
  const auto b = bit_cast<Mask<Sum>>(x + Sum(0));  // -0 becomes 0
  return x == x ? b ^ ((b >> kShift) & kLargest) : Mask<Sum>{} - kLargest - 1;
}

// It returns which sequence of an entry of the batch has the row, or -1.
inline std::int64_t sequence_of(const SequenceRows& sequences, std::int64_t batch, std::int64_t row) {
  if (!sequences.starts) return 0;
  const std::int32_t* starts = sequences.starts + batch * sequences.count;
  std::int64_t low = 0, high = sequences.count;  // those before low start at the row or before it, from high on behind
  while (low < high) {
    const std::int64_t middle = (low + high) / 2;
    if (starts[middle] <= row) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low > 0 && row < sequences.ends[batch * sequences.count + low - 1] ? low - 1 : -1;
}

template <class Input>
class RoutingProducts {
 public:
  using Sum = typename Arithmetic<Input>::Sum;
  using A = FusedMultiplyAdd<Sum>;
  static constexpr std::int64_t kRows = 2 * kRowMultiple;  // of a tile

  // Centroids first .. first + count - 1 of a head, as many as `lanes` at most.
  RoutingProducts(const RouteParams& p, std::int64_t lanes, Arena& arena)
      : p_(p),
        lanes_(lanes),
        centroids_(arena.take<Sum>(p.head_dim * lanes)),
        rows_(arena.take<Sum>(kRows * p.head_dim)),
        products_(arena.take<Sum>(kRows * lanes)) {}

  void set(std::int64_t head, std::int64_t first, std::int64_t count) const {
    const float* from = p_.centroids + (head * p_.clusters + first) * p_.head_dim;
    for (std::int64_t d = 0; d < p_.head_dim; ++d)
      for (std::int64_t c = 0; c < lanes_; ++c)
        centroids_[d * lanes_ + c] = c < count ? Sum(from[c * p_.head_dim + d]) : Sum(0);
  }

  // Calls visit(row, products[lanes]) for rows first .. end - 1 of a head.
  template <class Visit>
  void for_each(std::int64_t batch, std::int64_t head, std::int64_t first, std::int64_t end, Visit visit) const {
    for (std::int64_t row = first; row < end; row += kRows) {
      const std::int64_t count = smaller(kRows, end - row);
      for (std::int64_t i = 0; i < count; ++i) {
        convert_row(rows_ + i * p_.head_dim, row_of<const Input>(p_.rows, batch, head / p_.group, row + i),
                    p_.head_dim);
        normalise(rows_ + i * p_.head_dim, p_.head_dim);
      }
      gemm<A>({rows_, p_.head_dim, 1, centroids_, lanes_, products_, lanes_}, count, lanes_ / kLanes<Sum>, p_.head_dim,
              false);
      for (std::int64_t i = 0; i < count; ++i) visit(row + i, products_ + i * lanes_);
    }
  }

 private:
  const RouteParams& p_;
  std::int64_t lanes_;
  Sum *centroids_, *rows_, *products_;
};

}  // namespace attnx::cpu::ATTNX_ISA
