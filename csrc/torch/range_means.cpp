// This file registers torch.ops.attnx.range_means, block_means and block_statistics, which pool rows: sparse attentions
// choose by them.
#include <torch/csrc/stable/ops.h>

#include "arguments.h"
#include "attnx/capability.h"
#include "attnx/range_means_params.h"

namespace attnx::ops {

namespace {

constexpr const char* kSystem = "block_sparse_attention";

struct RowsAndRanges {
  StableTensor rows, ranges;
  ATTNX_FIELDS(rows, ranges)
};

struct RowsOfBlocks {
  StableTensor rows;
  std::int64_t block;
  ATTNX_FIELDS(rows, block)
};

struct MeansAndDeviations {
  StableTensor means, deviations;
  ATTNX_FIELDS(means, deviations)
};

RangeMeansParams read_rows(const StableTensor& rows) {
  const Capability& row = Target{kSystem, rows}.capability();
  check(rows.dim() == 4, "rows: expected 4 dimensions, (batch, heads, length, dim), got shape ", shape_of(rows));
  check(lists(row.dtypes, dtype_of(rows)), "rows: expected one of ", row.dtypes, ", got ", dtype_of(rows));
  check_layout("rows", rows);
  check(rows.size(3) >= row.head_dim_min && rows.size(3) <= row.head_dim_max, "rows: expected dim from ",
        row.head_dim_min, " to ", row.head_dim_max, ", got shape ", shape_of(rows));
  RangeMeansParams p;
  p.dtype = to_dtype(rows.scalar_type());
  p.batch = rows.size(0);
  p.heads = rows.size(1);
  p.length = rows.size(2);
  p.dim = rows.size(3);
  p.rows = view_rows(rows);
  return p;
}

StableTensor empty_means(const RangeMeansParams& p, const StableTensor& rows) {
  return make_empty(rows, {p.batch, p.heads, p.count, p.dim}, sum_type(rows));
}

StableTensor range_means(const RowsAndRanges& x) {
  RangeMeansParams p = read_rows(x.rows);
  check_dtype("ranges", x.ranges, ScalarType::Int, "");
  check(x.ranges.dim() == 3 && (x.ranges.size(0) == 1 || x.ranges.size(0) == p.batch) && x.ranges.size(2) == 2,
        "ranges: expected shape (", p.batch, " or 1, ranges, 2), got ", shape_of(x.ranges));
  check_contiguous("ranges", x.ranges);
  p.count = x.ranges.size(1);
  p.ranges = data<const std::int32_t>(x.ranges);
  p.ranges_batch_stride = x.ranges.size(0) == 1 ? 0 : 2 * p.count;
  if (const auto values = values_on_host(x.ranges))
    for (std::int64_t i = 0; i < x.ranges.numel(); i += 2) {
      const std::int32_t* const pair = data<const std::int32_t>(*values) + i;
      check(0 <= pair[0] && pair[0] <= pair[1] && pair[1] <= p.length,
            "ranges: expected a first row and one past the last of ", p.length, ", got ", pair[0], " and ", pair[1]);
    }
  StableTensor means = empty_means(p, x.rows);
  p.means = means.data_ptr();
  if (means.numel() > 0) run(p, {kSystem, x.rows});
  return means;
}

RangeMeansParams read_blocks(const RowsOfBlocks& x) {
  RangeMeansParams p = read_rows(x.rows);
  check(x.block >= 1, "block: expected 1 or more, got ", x.block);
  p.block = x.block;
  p.count = (p.length + x.block - 1) / x.block;
  return p;
}

StableTensor block_means(const RowsOfBlocks& x) {
  RangeMeansParams p = read_blocks(x);
  StableTensor means = empty_means(p, x.rows);
  p.means = means.data_ptr();
  if (means.numel() > 0) run(p, {kSystem, x.rows});
  return means;
}

MeansAndDeviations block_statistics(const RowsOfBlocks& x) {
  RangeMeansParams p = read_blocks(x);
  MeansAndDeviations y{empty_means(p, x.rows), empty_means(p, x.rows)};
  p.means = y.means.data_ptr();
  p.deviations = y.deviations.data_ptr();
  if (y.means.numel() > 0) run(p, {kSystem, x.rows});
  return y;
}

const Registration registration(kSystem, OnHost::kRefused,
                                {define<range_means>("range_means"), define<block_means>("block_means"),
                                 define<block_statistics>("block_statistics")});

}  // namespace

}  // namespace attnx::ops
