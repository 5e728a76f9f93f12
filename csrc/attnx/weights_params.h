// These kernels tell about the weights of an attention without its values.
#pragma once

#include "attnx/params.h"

namespace attnx {

// This is a number for each row, [batch, heads_q, length_q], whose rows are contiguous, in the accumulator's type. It
// is null where absent. Strides are 0 where one number serves all.
struct PerRow {
  const void* data = nullptr;
  std::int64_t batch_stride = 0, head_stride = 0;
};

// value and value_dim are those of the key, and have no other part in it. The result is contiguous, in the
// accumulator's type, but for indices.
struct WeightsParams : AttentionParams {
  Tensor logsumexp;  // of normalised scores, as from the forward; largest logits ask for none
  void* result = nullptr;
};

// The kernel sums over the rows of their weights times row_weights: [batch, heads_q, length_k].
struct KeyWeightsParams : WeightsParams {
  PerRow row_weights;  // null: 1 each
};
// The weights: [batch, heads_q, length_q, length_k].
struct RowWeightsParams : WeightsParams {};
// The largest logit of each row, -inf where it sees no key: [batch, heads_q, length_q].
struct MaxLogitsParams : WeightsParams {};
// The result is the key of the largest logit of each row, the lower one of equals, and -1 where it sees no key: int64,
// [batch, heads_q, length_q]. With a temperature each logit gets that many times a draw (attnx/gumbel.h) first.
struct ChosenKeysParams : WeightsParams {
  double temperature = 0;
  // These are numbers in the memory of the tensors, as those of LogitTerms are; null without a temperature.
  const std::int64_t *seed = nullptr, *offset = nullptr;
};
// The results are the gain and the shift of each row, where p.sharpening points.
struct SoftplusRowsParams : WeightsParams {};

}  // namespace attnx
