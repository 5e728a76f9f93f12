#include "tiling.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/logits/terms.h"

namespace attnx::cuda {

bool is_aligned(const AttentionParams& p, const Tensor& x, std::int64_t heads, std::int64_t features) {
  const auto whole = [](std::int64_t elements) { return elements % 8 == 0; };
  return reinterpret_cast<std::uintptr_t>(x.data) % 16 == 0 && whole(features) && whole(x.row_stride) &&
         (p.batch == 1 || whole(x.batch_stride)) && (heads == 1 || whole(x.head_stride));
}

bool are_aligned(const AttentionParams& p, std::initializer_list<Tensor> of_query, std::initializer_list<Tensor> of_key,
                 std::initializer_list<Tensor> of_value) {
  const auto all = [&](std::initializer_list<Tensor> tensors, std::int64_t heads, std::int64_t features) {
    return std::all_of(tensors.begin(), tensors.end(),
                       [&](const Tensor& x) { return is_aligned(p, x, heads, features); });
  };
  return all(of_query, p.heads_q, p.head_dim) && all(of_key, p.heads_k, p.head_dim) &&
         all(of_value, p.heads_k, p.value_dim);
}

std::int64_t heads_in_tile(const AttentionParams& p) {
  return p.key_blocks.counts || has_terms(p) ? 1 : p.heads_q / p.heads_k;
}

std::int64_t whole_heads_in_tile(const AttentionParams& p, int rows_of_tile) {
  const std::int64_t group = heads_in_tile(p);
  return rows_of_tile % group == 0 ? group : 1;
}

Geometry geometry_of(const AttentionParams& p, int rows_of_tile, std::int64_t group) {
  // With lists, rows count up to the end of the last block, because the backward visits all of its tiles.
  const std::int64_t rows = p.key_blocks.counts ? ceil_div(p.length_q, p.block_q) * p.block_q : group * p.length_q;
  const auto check_length = [](const char* name, std::int64_t length) {
    if (length >= kUnbounded)
      throw std::runtime_error(std::string(name) + ": expected fewer than 2^30 rows (of all heads that share a key " +
                               "head), got " + std::to_string(length));
  };
  check_length("query", rows);
  check_length("key", p.length_k);
  if (p.position_offset != 0 && (rows >= kUnbounded / 4 || p.length_k >= kUnbounded / 4))
    throw std::runtime_error("position_offset: expected 0 with 2^28 rows or keys, got " +
                             std::to_string(p.position_offset));
  const auto bound = [](std::int64_t side) {
    return int(side < 0 ? kUnbounded : std::min<std::int64_t>(side, kUnbounded));
  };
  Geometry g{};
  g.batch = p.batch;
  g.heads_q = p.heads_q;
  g.heads_k = p.heads_k;
  g.length_q = p.length_q;
  g.length_k = p.length_k;
  g.head_dim = p.head_dim;
  g.value_dim = p.value_dim;
  g.cu_seqlens_q = p.cu_seqlens_q;
  g.key_starts = p.key_starts;
  g.key_ends = p.key_ends;
  g.group = Divisor(group);
  g.heads = Divisor(p.heads_q / group);
  g.query_blocks = Divisor(std::max<std::int64_t>(ceil_div(rows, rows_of_tile), 1));
  g.tiles_of_block = p.key_blocks.counts ? std::max(int(p.block_q) / rows_of_tile, 1) : 1;
  g.left = bound(p.window_left);
  g.right = bound(p.window_right);
  g.position_offset = int(p.position_offset);
  return g;
}

LogitScaling scaling_of(const AttentionParams& p) {
  return {float(p.scale), float(p.scale * 1.4426950408889634), p.alibi_slopes};
}

}  // namespace attnx::cuda
