// What the forward and the backward of linear attention share: phi of queries and keys, values with a 1 after them, and
// which blocks a row of blocks sees.
//
// With values [v, 1] numerator and denominator are one product: phi(q) . sum_j phi(k_j) [v_j, 1]. Everything is kept
// in the type of the sums.
#pragma once

#include "../arena.h"
#include "../products.h"
#include "../rows.h"
#include "../tiles/band.h"
#include "block_sums.h"
#include "features.h"

namespace attnx::cpu::ATTNX_ISA {

template <class Input>
struct LinearOperands : Products<typename Arithmetic<Input>::Sum> {
  using Sum = typename Arithmetic<Input>::Sum;
  using Terms = typename BlockSums<Sum>::Terms;

  const LinearParams& p;
  std::int64_t group;                    // query heads of a key head
  std::int64_t head_lanes, value_lanes;  // a row of phi; of a value, its 1 included
  std::int64_t key_lanes;                // a block of keys, as lanes

  explicit LinearOperands(const LinearParams& params)
      : p(params),
        group(p.heads_q / p.heads_k),
        head_lanes(round_up(p.head_dim, kLanes<Sum>)),
        value_lanes(round_up(p.value_dim + 1, kLanes<Sum>)),
        key_lanes(round_up(p.block_k, kLanes<Sum>)) {}

  struct Range {
    std::int64_t first, count;
  };
  static Range block_rows(std::int64_t block, std::int64_t size, std::int64_t length) {
    return {block * size, smaller(size, length - block * size)};
  }
  Range queries(const Sequence& s, std::int64_t block) const { return block_rows(block, p.block_q, s.length_q); }
  Range keys(const Sequence& s, std::int64_t block) const { return block_rows(block, p.block_k, s.length_k); }
  std::int64_t query_blocks(const Sequence& s) const { return (s.length_q + p.block_q - 1) / p.block_q; }
  std::int64_t key_blocks(const Sequence& s) const { return (s.length_k + p.block_k - 1) / p.block_k; }

  // Keys that the query sees: the first ones.
  std::int64_t visible(const Sequence& s, std::int64_t query) const {
    return BandTiles(p, s, 0, 0).row(query + s.length_k - s.length_q).end;
  }
  // Blocks that all, and that some queries of a block see; both rise from block to block.
  std::int64_t seen_by_all(const Sequence& s, std::int64_t block) const {
    const std::int64_t end = visible(s, queries(s, block).first);
    return end == s.length_k ? key_blocks(s) : end / p.block_k;
  }
  std::int64_t seen_by_some(const Sequence& s, std::int64_t block) const {
    const Range rows = queries(s, block);
    return (visible(s, rows.first + rows.count - 1) + p.block_k - 1) / p.block_k;
  }

  const std::int8_t* labels(const Sequence& s, std::int64_t head, std::int64_t query_block) const {
    return p.labels + s.batch * p.labels_batch_stride + head * p.labels_head_stride + query_block * p.labels_row_stride;
  }
  bool in_scope(std::int8_t label) const { return (label >= p.scope_low) & (label <= p.scope_high); }

  // phi of a block's rows, [count][head_lanes].
  void load_features(const Tensor& from, const Sequence& s, std::int64_t head, std::int64_t first, Range rows,
                     Sum* to) const {
    for (std::int64_t i = 0; i < rows.count; ++i, to += head_lanes) {
      convert_row(to, row_of<const Input>(from, s.batch, head, first + rows.first + i), p.head_dim);
      map_features(p.feature_map, to, p.head_dim);
    }
  }
  void load_queries(const Sequence& s, std::int64_t head, Range rows, Sum* to) const {
    load_features(p.query, s, head, s.first_q, rows, to);
  }
  void load_keys(const Sequence& s, std::int64_t head, Range rows, Sum* to) const {
    load_features(p.key, s, head, s.first_k, rows, to);
  }
  // [v, 1] of a block's keys, [count][value_lanes].
  void load_values(const Sequence& s, std::int64_t head, Range rows, Sum* to) const {
    for (std::int64_t i = 0; i < rows.count; ++i, to += value_lanes) {
      convert_row(to, row_of<const Input>(p.value, s.batch, head, s.first_k + rows.first + i), p.value_dim);
      to[p.value_dim] = 1;
      for (std::int64_t d = p.value_dim + 1; d < value_lanes; ++d) to[d] = 0;
    }
  }

  // Drops, from products[queries][key_lanes], the pairs that the mask hides.
  void hide(const Sequence& s, Range q, Range k, Sum* products) const {
    for (std::int64_t i = 0; i < q.count; ++i, products += key_lanes) {
      const std::int64_t end = visible(s, q.first + i) - k.first;
      for (std::int64_t j = larger<std::int64_t>(end, 0); j < key_lanes; ++j) products[j] = 0;
    }
  }
};

}  // namespace attnx::cpu::ATTNX_ISA
