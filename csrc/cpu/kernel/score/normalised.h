// Scores whose weights are divided by their sum over the row share this.
#pragma once

#include "../rows.h"

namespace attnx::cpu::ATTNX_ISA {

template <class Sum>
inline bool sees_nothing(const Panel<Sum>& panel, int lane) {
  return panel.visible[lane].first == panel.visible[lane].end;
}

template <class A>
class NormalisedBackward {
  using Sum = typename A::Sum;
  static constexpr Sum kInfinity = __builtin_huge_valf();

 public:
  // It finds, for each row, the logsumexp and what dP is measured from: sum_j P_ij dP_ij, which is dO . O, less the
  // gradient of the logsumexp, whose derivative by a logit is P itself.
  template <class Input, class Sequence>
  void begin(const BackwardParams& p, const Sequence& s, const Panel<Sum>& panel) {
    Sum products[kPanelLanes<Sum>] = {};
    if (p.output.data) {
      const auto rows_of = [&](const Tensor& x) {
        return
            [&](std::int64_t i) { return row_of<const Input>(x, s.batch, panel.head[i], s.query_row(panel.query[i])); };
      };
      dots_of_rows(rows_of(p.output), rows_of(p.grad_output), panel.rows, p.value_dim, products);
    }
    for (int lane = 0; lane < kPanelLanes<Sum>; ++lane) {
      const std::int64_t head = panel.head[lane], result = s.result_row(panel.query[lane]);
      offset_[lane] =
          products[smaller(lane, panel.rows - 1)] - *row_of<const Sum>(p.grad_logsumexp, s.batch, head, result);
      const Sum logsumexp = *row_of<const Sum>(p.logsumexp, s.batch, head, result);
      // A row that sees nothing has no weights.
      logsumexp_[lane] = sees_nothing(panel, lane) || logsumexp == -kInfinity ? kInfinity : logsumexp;
    }
  }

  // It adds the products over some of the keys, where what is measured from is not known from the output.
  ATTNX_INLINE void add_products(int lane, Vec<Sum> products) {
    store(offset_ + lane, load(offset_ + lane) + products);
  }

 protected:
  alignas(kVectorBytes) Sum logsumexp_[kPanelLanes<Sum>], offset_[kPanelLanes<Sum>];
};

}  // namespace attnx::cpu::ATTNX_ISA
