// torch.ops.attnx.sparse_linear_labels: which blocks of keys are critical, marginal and negligible to each block of
// queries, from the products of their means.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "backend.h"

namespace attnx::ops {

namespace {

StableTensor sparse_linear_labels(const StableTensor& products, std::int64_t length_q, std::int64_t length_k,
                                  std::int64_t block_q, std::int64_t block_k, double critical, double negligible,
                                  bool is_causal, std::int64_t protect) {
  check(block_q > 0 && block_k > 0, "block_size: expected positive sizes, got (", block_q, ", ", block_k, ")");
  check(protect >= 0, "protect: expected a number of keys, 0 or more, got ", protect);
  const BlockGrid grid{length_q, length_k, block_q, block_k, is_causal};
  check(products.dim() == 4 && products.size(2) == grid.query_blocks() && products.size(3) == grid.key_blocks(),
        "products: expected shape (batch, heads, ", grid.query_blocks(), ", ", grid.key_blocks(), "), got ",
        shape_of(products));
  const bool is_double = products.scalar_type() == ScalarType::Double;
  if (!is_double) check_dtype("products", products, ScalarType::Float, " or float64");
  check_contiguous("products", products);
  StableTensor labels = torch::stable::new_empty(products, products.sizes(), ScalarType::Char);
  LabelBlocksParams p;
  p.grid = grid;
  p.heads = products.size(0) * products.size(1);
  p.dtype = is_double ? DType::kFloat64 : DType::kFloat32;
  p.products = products.data_ptr();
  p.critical = critical;
  p.negligible = negligible;
  p.protect = protect;
  p.labels = static_cast<std::int8_t*>(labels.data_ptr());
  run(p);
  return labels;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(attnx, m) {
  m.def(
      "sparse_linear_labels(Tensor products, SymInt length_q, SymInt length_k, int block_q, int block_k, "
      "float critical, float negligible, bool is_causal, SymInt protect) -> Tensor");
}

// On other devices the same in torch's own operators, from Python.
STABLE_TORCH_LIBRARY_IMPL(attnx, CPU, m) { m.impl("sparse_linear_labels", TORCH_BOX(&sparse_linear_labels)); }

}  // namespace attnx::ops
