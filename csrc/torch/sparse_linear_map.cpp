// This file registers torch.ops.attnx.sparse_linear_block_map and its packed form, which label blocks from queries and
// keys.
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "arguments.h"

namespace attnx::ops {

namespace {

constexpr const char* kSystem = "sparse_linear_attention";

struct QueryAndKey {
  StableTensor query, key;
  ATTNX_FIELDS(query, key)
};

struct MapOptions {
  double critical, negligible;
  std::string rounding;
  bool smooth_k;
  SymInt protect;
  ATTNX_FIELDS(critical, negligible, rounding, smooth_k, protect)
};

template <class Layout>
StableTensor block_map(const QueryAndKey& x, const Layout& layout, const BlockSize& size, const MapOptions& options,
                       const Causal& causal) {
  const Target target{kSystem, x.query};
  BlockMapParams p;
  read_block_size(size, p);
  read_inputs(target, {x.query, x.key, x.key}, layout, p);
  read_window(causal, p);
  if constexpr (std::is_same_v<Layout, Packed>) {  // a map is as wide as was told, even beyond the longest sequence
    p.length_q = std::min<std::int64_t>(layout.max_seqlen_q, x.query.size(0));
    p.length_k = std::min<std::int64_t>(layout.max_seqlen_k, x.key.size(0));
  }
  p.smooth_k = options.smooth_k;
  p.shares = read_shares(options.critical, options.negligible, options.rounding, options.protect);
  const std::vector shape{p.batch, p.heads_q, blocks_of(p.length_q, p.block_q), blocks_of(p.length_k, p.block_k)};
  StableTensor labels = make_empty(x.query, shape, ScalarType::Char);
  p.labels = data<std::int8_t>(labels);
  if (labels.numel() > 0) run(p, target);
  return labels;
}

const Registration registration(kSystem, OnHost::kRefused,
                                {define<block_map<DenseWithLengths>>("sparse_linear_block_map"),
                                 define<block_map<Packed>>("sparse_linear_block_map_varlen")});

}  // namespace

}  // namespace attnx::ops
