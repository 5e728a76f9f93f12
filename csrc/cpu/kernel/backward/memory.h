// This is the working storage of the backward loop: what a panel of rows holds, what a worker needs for a tile of keys,
// and what a unit sums over its rows.
#pragma once

#include "../arena.h"
#include "../gemm.h"
#include "../rows.h"

namespace attnx::cpu::ATTNX_ISA {

// Sizes count elements, or keys where their names say so.
template <class Sum>
struct BackwardSizes {
  std::int64_t head_stride, value_stride;  // of rows of queries and keys, and of values
  std::int64_t head_lanes, value_lanes;    // the same as lanes of sums
  std::int64_t tile_keys, panels;
  std::int64_t keys;                             // whose gradients a unit sums; 0 where these sums lie elsewhere
  std::int64_t group;                            // query heads of a key head
  bool sums_added = false, sums_shares = false;  // of terms of logits
  std::int64_t distances = 0;                    // of numbers by distance whose gradients a unit sums

  BackwardSizes(const AttentionParams& p, std::int64_t most_tile_keys, std::int64_t most_panels, std::int64_t most_keys)
      : head_stride(row_stride(p.head_dim)),
        value_stride(row_stride(p.value_dim)),
        head_lanes(round_up(p.head_dim, kLanes<Sum>)),
        value_lanes(round_up(p.value_dim, kLanes<Sum>)),
        tile_keys(most_tile_keys),
        panels(most_panels),
        keys(most_keys),
        group(p.heads_q / p.heads_k) {}

 private:
  // The stride is wide enough for blocks of rows (as an A operand contracted over rows) and for vectors (as a B
  // operand).
  static std::int64_t row_stride(std::int64_t dim) {
    return larger(round_up(dim, kRowMultiple), round_up(dim, kLanes<Sum>));
  }
};

// One panel of rows holds these through the loop over the keys.
template <class A, class Score>
struct BackwardRows {
  using Element = typename A::Element;
  using Sum = typename A::Sum;

  Panel<Sum>* panel;
  typename Score::template Backward<A>* score;
  Element *query, *grad;            // transposed, steps over features
  Element *query_rows, *grad_rows;  // steps over rows
  Sum* grad_query;                  // transposed
  double *grad_bias, *grad_slope;   // per lane
  Finiteness query_finite, grad_finite;

  // Adds the gradients of the biases of all rows to one that they share.
  void move_grad_bias(double& to) const {
    for (int lane = 0; lane < panel->rows; ++lane) {
      to += grad_bias[lane];
      grad_bias[lane] = 0;
    }
  }
};

template <class A, class Score, class Logits>
struct BackwardBuffers {
  using Element = typename A::Element;
  using Sum = typename A::Sum;
  static constexpr int kWidth = kPanelLanes<Sum>;
  static constexpr int kMaxPanels = 4;

  Element *keys, *keys_by_step, *values, *rows, *weights, *grads, *grads_by_step;
  Sum *products, *grad_weights;
  Finiteness keys_finite;  // of a tile
  BackwardRows<A, Score> panel[kMaxPanels];
  Arena arena;
  typename Logits::template Backward<A, Score> logits;
  std::int64_t bytes;

  BackwardBuffers(const BackwardParams& p, const BackwardSizes<Sum>& sizes, char* block)
      : arena(block), logits(p, sizes.tile_keys, sizes.panels, arena) {
    constexpr bool kPlain = A::kStep == 1;  // an operand reads the same by row and by step
    keys = arena.take<Element>(sizes.tile_keys * sizes.head_stride);
    keys_by_step = kPlain ? keys : arena.take<Element>(sizes.tile_keys * sizes.head_stride);
    values = arena.take<Element>(sizes.tile_keys * sizes.value_stride);
    rows = arena.take<Element>(kWidth * larger(sizes.head_stride, sizes.value_stride));
    products = arena.take<Sum>(sizes.tile_keys * kWidth);
    grad_weights = arena.take<Sum>(sizes.tile_keys * kWidth);
    weights = arena.take<Element>(sizes.tile_keys * kWidth);
    grads = arena.take<Element>(sizes.tile_keys * kWidth);
    grads_by_step = kPlain ? grads : arena.take<Element>(sizes.tile_keys * kWidth);
    for (int i = 0; i < sizes.panels; ++i) {
      panel[i].panel = arena.take<Panel<Sum>>(1);
      panel[i].score = arena.take<typename Score::template Backward<A>>(1);
      panel[i].query = arena.take<Element>(sizes.head_stride * kWidth);
      panel[i].grad = arena.take<Element>(sizes.value_stride * kWidth);
      panel[i].query_rows = arena.take<Element>(sizes.head_lanes * kWidth);
      panel[i].grad_rows = arena.take<Element>(sizes.value_lanes * kWidth);
      panel[i].grad_query = arena.take<Sum>(sizes.head_stride * kWidth);
      panel[i].grad_bias = arena.take<double>(kWidth);
      panel[i].grad_slope = arena.take<double>(kWidth);
    }
    bytes = arena.used();
  }
};

// A unit sums these over its query rows.
template <class Sum, class Logits>
struct BackwardSums {
  Arena arena;
  typename Logits::Sums terms;
  Sum *grad_key, *grad_value;                  // [keys][lanes]
  double *grad_bias, *grad_slope, *grad_sink;  // [group]
  std::int64_t bytes;

  BackwardSums(const BackwardSizes<Sum>& sizes, char* block) : arena(block), terms(sizes, arena) {
    grad_key = arena.take<Sum>(sizes.keys * sizes.head_lanes);
    grad_value = arena.take<Sum>(sizes.keys * sizes.value_lanes);
    grad_bias = arena.take<double>(sizes.group);
    grad_slope = arena.take<double>(sizes.group);
    grad_sink = arena.take<double>(sizes.group);
    bytes = arena.used();
  }
};

}  // namespace attnx::cpu::ATTNX_ISA
