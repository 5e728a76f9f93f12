// This makes the map of sparse-linear attention: it labels blocks by their products, and lists the critical ones. It
// selects instead of sorting, as only three sets of a row matter.
#include <bit>
#include <vector>

#include "attention.h"
#include "parallel.h"

namespace attnx::cpu {

namespace {

// The result ranks like the number, with -0 as 0 and NaN above all.
std::uint64_t rank_of(double x) {
  if (x != x) return ~std::uint64_t(0);
  const auto bits = std::bit_cast<std::uint64_t>(x + 0.0);
  constexpr std::uint64_t kSign = std::uint64_t(1) << 63;
  return bits & kSign ? ~bits : bits | kSign;
}

struct Block {
  std::uint64_t rank;
  std::int64_t index;

  bool operator<(const Block& other) const {  // the better comes first, of equals the lower index
    return rank != other.rank ? rank > other.rank : index < other.index;
  }
};

template <class Product>
void label_row(const LabelRow& row, const Product* products, std::vector<Block>& ranked, std::int8_t* labels) {
  ranked.clear();
  for (std::int64_t j = row.begin; j < row.end; ++j) ranked.push_back({rank_of(double(products[j])), j});
  const auto critical = ranked.begin() + row.critical, marginal_end = ranked.begin() + row.not_negligible;
  std::nth_element(ranked.begin(), critical, ranked.end());
  std::nth_element(critical, marginal_end, ranked.end());
  for (auto block = ranked.begin(); block != critical; ++block) labels[block->index] = 1;
  for (auto block = critical; block != marginal_end; ++block) labels[block->index] = 0;
}

template <class Product>
void label_rows(const LabelBlocksParams& p, std::int64_t begin, std::int64_t end) {
  const auto* products = static_cast<const Product*>(p.products);
  const std::int64_t rows = p.grid.query_blocks(), blocks = p.grid.key_blocks();
  std::vector<Block> ranked;
  ranked.reserve(std::size_t(blocks));
  for (std::int64_t r = begin; r < end; ++r) {
    const LabelRow row(p.grid, p.shares, r % rows);
    std::int8_t* const labels = p.labels + r * blocks;
    std::fill(labels, labels + row.candidates, std::int8_t(1));
    std::fill(labels + row.begin, labels + row.end, std::int8_t(-1));
    std::fill(labels + row.candidates, labels + blocks, std::int8_t(-1));
    label_row(row, products + r * blocks, ranked, labels);
  }
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
