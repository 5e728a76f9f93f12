// Rows of a sum over scores have two numbers: an offset, which is what their logits get, times log2(e), and another one
// that the summand asks for.
#pragma once

#include "attnx/weights_params.h"
#include "cuda/common/sequence.h"
#include "cuda/mainloop/sums_arguments.h"

namespace attnx::cuda {

// These are the numbers of one query head.
class HeadOfBackward {
  const float *offset_, *delta_;
  int stride_;  // from a row to the next

 public:
  __device__ __forceinline__ HeadOfBackward(const RowsOfBackward& rows, int batch, const Sequence& sequence,
                                            int query_head)
      : stride_(rows.layout.group.divisor()) {
    const std::int64_t first = first_row(rows, batch, sequence, query_head);
    offset_ = rows.offset + first;
    delta_ = rows.delta ? rows.delta + first : nullptr;
  }
  // This is the place of the head's first row.
  static __device__ __forceinline__ std::int64_t first_row(const RowsOfBackward& rows, int batch,
                                                           const Sequence& sequence, int query_head) {
    const int head = rows.layout.group.divide(query_head);
    const std::int64_t tile =
        head * rows.layout.row_tiles + row_tile_of(rows.layout, batch, sequence, 0, rows.rows_of_tile);
    return tile * rows.rows_of_tile + query_head - head * rows.layout.group.divisor();
  }
  __device__ __forceinline__ float offset(int row) const { return __ldg(offset_ + std::int64_t(row) * stride_); }
  __device__ __forceinline__ float other(int row) const {
    return delta_ ? __ldg(delta_ + std::int64_t(row) * stride_) : 0;
  }
};

// These are the numbers of sharpened rows of one query head.
class HeadOfSharpened {
  const float* delta_;
  SharpenedRow* rows_;
  int stride_;

 public:
  struct Numbers {
    SharpenedRow row;
    float delta;
  };

  __device__ __forceinline__ HeadOfSharpened(const RowsOfSharpened& rows, int batch, const Sequence& sequence,
                                             int query_head)
      : stride_(rows.layout.group.divisor()) {
    const std::int64_t first = HeadOfBackward::first_row(rows, batch, sequence, query_head);
    delta_ = rows.delta + first;
    rows_ = rows.sharpened + first;
  }
  __device__ __forceinline__ float offset(int) const { return 0; }
  __device__ __forceinline__ Numbers other(int row) const {
    return {this->row(row), __ldg(delta_ + std::int64_t(row) * stride_)};
  }
  __device__ __forceinline__ SharpenedRow& row(int row) const { return rows_[std::int64_t(row) * stride_]; }
};

// These are the numbers of rows of weights: their logsumexp, or their bias, and what a row counts.
template <class Score>
struct RowsOfWeights {
  Tensor logsumexp;  // of normalised scores
  PerRow counts;     // null: 1 each
  typename Score::Parameters score;
};

template <class Score>
class HeadOfWeights {
  const RowsOfWeights<Score>& rows_;
  const Band& band_;
  int query_head_;
  const float *logsumexp_, *counts_;

 public:
  __device__ __forceinline__ HeadOfWeights(const RowsOfWeights<Score>& rows, int batch, const Sequence& sequence,
                                           int query_head)
      : rows_(rows),
        band_(sequence.band),
        query_head_(query_head),
        logsumexp_(rows_of<const float>(rows.logsumexp, batch, query_head, 0)),
        counts_(static_cast<const float*>(rows.counts.data)) {
    if (counts_) counts_ += batch * rows.counts.batch_stride + query_head * rows.counts.head_stride;
  }
  __device__ __forceinline__ float offset(int row) const {
    if constexpr (Score::kNormalised) {
      const float logsumexp = __ldg(logsumexp_ + row);
      return logsumexp == -INFINITY ? -INFINITY : -logsumexp * kLog2E;  // else the row sees no key
    } else {
      return rows_.score.row_bias_log2(band_, query_head_, row);
    }
  }
  __device__ __forceinline__ float other(int row) const { return counts_ ? __ldg(counts_ + row) : 1; }
};

// Logits alone ask for nothing.
struct PlainRows {};

struct HeadOfPlainRows {
  __device__ __forceinline__ HeadOfPlainRows(const PlainRows&, int, const Sequence&, int) {}
  __device__ __forceinline__ float offset(int) const { return 0; }
  __device__ __forceinline__ float other(int) const { return 0; }
};

}  // namespace attnx::cuda
