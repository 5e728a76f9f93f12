// torch.ops.attnx.sparse_linear_labels: which blocks of keys are critical, marginal and negligible to each block of
// queries, from the products of their means. Selection instead of sorting: of a row only three sets matter.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <vector>

#include "check.h"

namespace attnx::ops {

namespace {

// Ranks like the number, with -0 as 0 and NaN above all.
std::uint64_t rank_of(double x) {
  if (x != x) return ~std::uint64_t(0) - 1;
  const auto bits = std::bit_cast<std::uint64_t>(x + 0.0);
  constexpr std::uint64_t kSign = std::uint64_t(1) << 63;
  return bits & kSign ? ~bits : bits | kSign;
}
constexpr std::uint64_t kForced = ~std::uint64_t(0);

struct Block {
  std::uint64_t rank;
  std::int64_t index;

  bool operator<(const Block& other) const {  // the better first, of equals the lower index
    return rank != other.rank ? rank > other.rank : index < other.index;
  }
};

struct Grid {
  std::int64_t length_q, length_k, block_q, block_k;
  double critical, negligible;
  bool is_causal;
  std::int64_t protect;

  std::int64_t rows() const { return (length_q + block_q - 1) / block_q; }
  std::int64_t blocks() const { return (length_k + block_k - 1) / block_k; }
  // How many keys the query sees: the first ones.
  std::int64_t seen(std::int64_t query) const {
    if (!is_causal) return length_k;
    return std::clamp<std::int64_t>(query + length_k - length_q + 1, 0, length_k);
  }
  // share * count, without the last bits in which a product that should be whole is not.
  static double share_of(double share, std::int64_t count) {
    return std::nearbyint(share * double(count) * 0x1p30) * 0x1p-30;
  }
};

template <class Product>
void label_row(const Grid& grid, std::int64_t row, const Product* products, std::vector<Block>& ranked,
               std::int8_t* labels) {
  const std::int64_t blocks = grid.blocks();
  std::fill(labels, labels + blocks, std::int8_t(-1));
  const std::int64_t first = grid.seen(row * grid.block_q);
  const std::int64_t last = grid.seen(std::min((row + 1) * grid.block_q, grid.length_q) - 1);
  const std::int64_t some = (last + grid.block_k - 1) / grid.block_k;  // candidates: some query sees them
  if (some == 0) return;
  // Critical whatever their rank: blocks that other queries of the row do not see, and the last of the candidates.
  std::int64_t every = blocks;
  if (grid.is_causal) every = std::min(first == grid.length_k ? blocks : first / grid.block_k, some - 1);
  const std::int64_t protect = std::min((grid.protect + grid.block_k - 1) / grid.block_k, some);
  ranked.clear();
  std::int64_t forced = 0;
  for (std::int64_t j = 0; j < some; ++j) {
    const bool is_forced = j >= every || j < protect;
    forced += is_forced;
    ranked.push_back({is_forced ? kForced : rank_of(double(products[j])), j});
  }
  const auto most = std::int64_t(std::ceil(Grid::share_of(grid.critical, some)));
  const std::int64_t critical = std::min(std::max({std::int64_t(1), most, forced}), some);
  const std::int64_t least = some - std::int64_t(std::floor(Grid::share_of(grid.negligible, some)));
  const auto end = ranked.begin() + critical, marginal_end = ranked.begin() + std::max(critical, least);
  std::nth_element(ranked.begin(), end, ranked.end());
  std::nth_element(end, marginal_end, ranked.end());
  for (auto block = ranked.begin(); block != end; ++block) labels[block->index] = 1;
  for (auto block = end; block != marginal_end; ++block) labels[block->index] = 0;
}

StableTensor sparse_linear_labels(const StableTensor& products, std::int64_t length_q, std::int64_t length_k,
                                  std::int64_t block_q, std::int64_t block_k, double critical, double negligible,
                                  bool is_causal, std::int64_t protect) {
  check(block_q > 0 && block_k > 0, "block_size: expected positive sizes, got (", block_q, ", ", block_k, ")");
  check(protect >= 0, "protect: expected a number of keys, 0 or more, got ", protect);
  const Grid grid{length_q, length_k, block_q, block_k, critical, negligible, is_causal, protect};
  check(products.dim() == 4 && products.size(2) == grid.rows() && products.size(3) == grid.blocks(),
        "products: expected shape (batch, heads, ", grid.rows(), ", ", grid.blocks(), "), got ", shape_of(products));
  const bool is_double = products.scalar_type() == ScalarType::Double;
  if (!is_double) check_dtype("products", products, ScalarType::Float, " or float64");
  check(products.is_contiguous(), "products: expected a contiguous tensor, got one with other strides");
  StableTensor labels = torch::stable::new_empty(products, products.sizes(), ScalarType::Char);
  const std::int64_t blocks = grid.blocks(), rows = products.size(0) * products.size(1) * grid.rows();
  constexpr std::int64_t kBlocksOfTask = 16384;  // some 100 us
  const std::int64_t rows_of_task = std::max<std::int64_t>(kBlocksOfTask / std::max<std::int64_t>(blocks, 1), 1);
  torch::stable::parallel_for(0, rows, rows_of_task, [&](std::int64_t begin, std::int64_t end) {
    std::vector<Block> ranked;
    ranked.reserve(std::size_t(blocks));
    for (std::int64_t r = begin; r < end; ++r) {
      auto* to = static_cast<std::int8_t*>(labels.data_ptr()) + r * blocks;
      if (is_double) {
        label_row(grid, r % grid.rows(), static_cast<const double*>(products.data_ptr()) + r * blocks, ranked, to);
      } else {
        label_row(grid, r % grid.rows(), static_cast<const float*>(products.data_ptr()) + r * blocks, ranked, to);
      }
    }
  });
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
