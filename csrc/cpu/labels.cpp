// This makes the map of sparse-linear attention: it labels blocks by their products, and lists the critical ones. It
// selects instead of sorting, as only three sets of a row matter.
#include <bit>
#include <vector>

#include "attention.h"
#include "dispatch.h"
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

// It labels one row of blocks. Ranked has room for all of them.
template <class Product>
void label_row(const LabelRow& row, const Product* products, std::int64_t blocks, Block* ranked, std::int8_t* labels) {
  std::fill(labels, labels + row.candidates, std::int8_t(1));
  std::fill(labels + row.begin, labels + row.end, std::int8_t(-1));
  std::fill(labels + row.candidates, labels + blocks, std::int8_t(-1));
  Block* end = ranked;
  for (std::int64_t j = row.begin; j < row.end; ++j) *end++ = {rank_of(double(products[j])), j};
  Block *const critical = ranked + row.critical, *const marginal_end = ranked + row.not_negligible;
  std::nth_element(ranked, critical, end);
  std::nth_element(critical, marginal_end, end);
  for (const Block* block = ranked; block != critical; ++block) labels[block->index] = 1;
  for (const Block* block = critical; block != marginal_end; ++block) labels[block->index] = 0;
}

BlockGrid grid_of(const BlockMapParams& p, std::int64_t length_q, std::int64_t length_k) {
  return {length_q, length_k, p.block_q, p.block_k, p.window_right == 0};
}

template <class Product>
void label_rows(const LabelBlocksParams& p, std::int64_t begin, std::int64_t end) {
  const auto* products = static_cast<const Product*>(p.products);
  const std::int64_t rows = p.grid.query_blocks(), blocks = p.grid.key_blocks();
  std::vector<Block> ranked(std::size_t(blocks) + 1);
  for (std::int64_t r = begin; r < end; ++r)
    label_row(LabelRow(p.grid, p.shares, r % rows), products + r * blocks, blocks, ranked.data(),
              p.labels + r * blocks);
}

// It labels the row of blocks whose products a kernel hands out.
void receive(const void* receiver, const BlockProductsParams::Row& row) {
  const auto& p = *static_cast<const BlockMapParams*>(receiver);
  const BlockGrid longest = grid_of(p, p.length_q, p.length_k), own = grid_of(p, row.length_q, row.length_k);
  const std::int64_t blocks = longest.key_blocks();
  std::int8_t* const labels =
      p.labels + ((row.batch * p.heads_q + row.head) * longest.query_blocks() + row.block) * blocks;
  auto* const ranked = static_cast<Block*>(row.scratch);
  const LabelRow numbers(own, p.shares, row.block);
  p.dtype == DType::kFloat64 ? label_row(numbers, static_cast<const double*>(row.products), blocks, ranked, labels)
                             : label_row(numbers, static_cast<const float*>(row.products), blocks, ranked, labels);
}

// It returns how many rows are worth a thread, at so many blocks a part.
std::int64_t rows_of_part(std::int64_t blocks, std::int64_t blocks_of_part) {
  return std::max<std::int64_t>(blocks_of_part / std::max<std::int64_t>(blocks, 1), 1);
}

}  // namespace

void block_map(const BlockMapParams& p, const Executor& executor) {
  const BlockGrid longest = grid_of(p, p.length_q, p.length_k);
  const std::int64_t rows = p.batch * p.heads_q * longest.query_blocks();
  // Rows beyond the end of a shorter sequence have no products.
  if (p.key_ends) std::fill_n(p.labels, rows * longest.key_blocks(), std::int8_t(-1));
  BlockProductsParams products;
  static_cast<AttentionParams&>(products) = p;
  products.smooth_k = p.smooth_k;
  products.scratch_bytes = (longest.key_blocks() + 1) * std::int64_t(sizeof(Block));
  products.receive = receive;
  products.receiver = &p;
  const double dim = double(p.head_dim);
  const double operations = double(p.batch) * dim * double(p.heads_q * p.length_q + p.heads_k * p.length_k) +
                            double(rows * longest.key_blocks()) * (2 * dim + 16);
  run(&Kernels::block_products_workspace, &Kernels::block_products, products, executor, operations);
}

void label_blocks(const LabelBlocksParams& p, const Executor& executor) {
  parallel_for(executor, p.heads * p.grid.query_blocks(), rows_of_part(p.grid.key_blocks(), 1 << 14),
               [&](std::int64_t begin, std::int64_t end) {
                 p.dtype == DType::kFloat64 ? label_rows<double>(p, begin, end) : label_rows<float>(p, begin, end);
               });
}

void critical_blocks(const CriticalBlocksParams& p, const Executor& executor) {
  const std::int64_t lists = p.transposed ? p.key_blocks : p.query_blocks;
  const std::int64_t blocks = p.transposed ? p.query_blocks : p.key_blocks;  // that a list may name
  const std::int64_t list_stride = p.transposed ? 1 : p.key_blocks, block_stride = p.transposed ? p.key_blocks : 1;
  parallel_for(executor, p.heads * lists, rows_of_part(blocks, 1 << 18), [&](std::int64_t begin, std::int64_t end) {
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
