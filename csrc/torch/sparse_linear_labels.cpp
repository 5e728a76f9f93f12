// This file registers torch.ops.attnx.sparse_linear_labels, which tells which blocks of keys are critical, marginal and
// negligible to each block of queries, from the products of their means.
#include <torch/csrc/stable/ops.h>

#include "arguments.h"

namespace attnx::ops {

namespace {

constexpr const char* kSystem = "sparse_linear_attention";

struct Arguments {
  StableTensor products;
  SymInt length_q, length_k;
  std::int64_t block_q, block_k;
  double critical, negligible;
  std::string rounding;
  bool is_causal;
  SymInt protect;
  ATTNX_FIELDS(products, length_q, length_k, block_q, block_k, critical, negligible, rounding, is_causal, protect)
};

StableTensor labels(const Arguments& a) {
  check_block_size({a.block_q, a.block_k});
  check_length("length_q", a.length_q);
  check_length("length_k", a.length_k);
  const BlockShares shares = read_shares(a.critical, a.negligible, a.rounding, a.protect);
  const StableTensor& products = a.products;
  const BlockGrid grid{a.length_q, a.length_k, a.block_q, a.block_k, a.is_causal};
  check(products.dim() == 4 && products.size(2) == grid.query_blocks() && products.size(3) == grid.key_blocks(),
        "products: expected shape (batch, heads, ", grid.query_blocks(), ", ", grid.key_blocks(), "), got ",
        shape_of(products));
  const Target target{kSystem, products};
  if (target.on_cuda() || products.scalar_type() != ScalarType::Double)
    check_dtype("products", products, ScalarType::Float, target.on_cuda() ? "" : " or float64");
  check_contiguous("products", products);
  StableTensor result = make_empty(products, products.sizes(), ScalarType::Char);
  run(LabelBlocksParams{.grid = grid,
                        .heads = products.size(0) * products.size(1),
                        .dtype = to_dtype(products.scalar_type()),
                        .products = products.data_ptr(),
                        .shares = shares,
                        .labels = data<std::int8_t>(result)},
      target);
  return result;
}

// On other devices torch's own operators do the same, from Python.
const Registration registration(kSystem, OnHost::kServed, {define<labels>("sparse_linear_labels")});

}  // namespace

}  // namespace attnx::ops
