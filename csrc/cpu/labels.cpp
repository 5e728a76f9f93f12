// This makes the map of sparse-linear attention: it labels blocks by their products, and lists the critical ones. It
// selects instead of sorting, as only three sets of a row matter.
#include <bit>
#include <cmath>
#include <vector>

#include "attention.h"
#include "parallel.h"

namespace attnx::cpu {

namespace {

// The result ranks like the number, with -0 as 0 and NaN above all.
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

  bool operator<(const Block& other) const {  // the better comes first, of equals the lower index
    return rank != other.rank ? rank > other.rank : index < other.index;
  }
};

// It returns how many keys a query sees; these are the first ones.
std::int64_t seen(const BlockGrid& grid, std::int64_t query) {
  if (!grid.is_causal) return grid.length_k;
  return std::clamp<std::int64_t>(query + grid.length_k - grid.length_q + 1, 0, grid.length_k);
}

// It returns share * count, without the last bits in which a product that should be whole is not.
double share_of(double share, std::int64_t count) { return std::nearbyint(share * double(count) * 0x1p30) * 0x1p-30; }

template <class Product>
void label_row(const LabelBlocksParams& p, std::int64_t row, const Product* products, std::vector<Block>& ranked,
               std::int8_t* labels) {
  const BlockGrid& grid = p.grid;
  const std::int64_t blocks = grid.key_blocks();
  std::fill(labels, labels + blocks, std::int8_t(-1));
  const std::int64_t first = seen(grid, row * grid.block_q);
  const std::int64_t last = seen(grid, std::min((row + 1) * grid.block_q, grid.length_q) - 1);
  const std::int64_t some = (last + grid.block_k - 1) / grid.block_k;  // candidates: some query sees them
  if (some == 0) return;
  // Blocks that other queries of the row do not see, and the last of the candidates, are critical whatever their rank.
  std::int64_t every = blocks;
  if (grid.is_causal) every = std::min(first == grid.length_k ? blocks : first / grid.block_k, some - 1);
  const std::int64_t protect = std::min((p.protect + grid.block_k - 1) / grid.block_k, some);
  ranked.clear();
  std::int64_t forced = 0;
  for (std::int64_t j = 0; j < some; ++j) {
    const bool is_forced = j >= every || j < protect;
    forced += is_forced;
    ranked.push_back({is_forced ? kForced : rank_of(double(products[j])), j});
  }
  const auto most = std::int64_t(std::ceil(share_of(p.critical, some)));
  const std::int64_t critical = std::min(std::max({std::int64_t(1), most, forced}), some);
  const std::int64_t least = some - std::int64_t(std::floor(share_of(p.negligible, some)));
  const auto end = ranked.begin() + critical, marginal_end = ranked.begin() + std::max(critical, least);
  std::nth_element(ranked.begin(), end, ranked.end());
  std::nth_element(end, marginal_end, ranked.end());
  for (auto block = ranked.begin(); block != end; ++block) labels[block->index] = 1;
  for (auto block = end; block != marginal_end; ++block) labels[block->index] = 0;
}

template <class Product>
void label_rows(const LabelBlocksParams& p, std::int64_t begin, std::int64_t end) {
  const auto* products = static_cast<const Product*>(p.products);
  const std::int64_t rows = p.grid.query_blocks(), blocks = p.grid.key_blocks();
  std::vector<Block> ranked;
  ranked.reserve(std::size_t(blocks));
  for (std::int64_t r = begin; r < end; ++r)
    label_row(p, r % rows, products + r * blocks, ranked, p.labels + r * blocks);
}

// It returns how many rows are worth a thread.
std::int64_t rows_of_part(std::int64_t blocks) {
  constexpr std::int64_t kBlocksOfPart = 16384;
  return std::max<std::int64_t>(kBlocksOfPart / std::max<std::int64_t>(blocks, 1), 1);
}

}  // namespace

void label_blocks(const LabelBlocksParams& p, const Executor& executor) {
  parallel_for(executor, p.heads * p.grid.query_blocks(), rows_of_part(p.grid.key_blocks()),
               [&](std::int64_t begin, std::int64_t end) {
                 p.dtype == DType::kFloat64 ? label_rows<double>(p, begin, end) : label_rows<float>(p, begin, end);
               });
}

void critical_blocks(const CriticalBlocksParams& p, const Executor& executor) {
  const std::int64_t lists = p.transposed ? p.key_blocks : p.query_blocks;
  const std::int64_t blocks = p.transposed ? p.query_blocks : p.key_blocks;  // that a list may name
  const std::int64_t list_stride = p.transposed ? 1 : p.key_blocks, block_stride = p.transposed ? p.key_blocks : 1;
  parallel_for(executor, p.heads * lists, rows_of_part(blocks), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t list = begin; list < end; ++list) {
      const std::int8_t* const labels = p.labels + list / lists * lists * blocks + list % lists * list_stride;
      std::int32_t* const first = p.indices + list * p.width;
      std::int32_t* next = first;
      for (std::int64_t block = 0; block < blocks; ++block)
        if (labels[block * block_stride] == 1) *next++ = std::int32_t(block);
      p.counts[list] = std::int32_t(next - first);
    }
  });
}

}  // namespace attnx::cpu
