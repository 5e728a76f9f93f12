// These are the kernels of one instruction set and dtype, as the dispatcher sees them.
#pragma once

#include <cstddef>

#include "attnx/delta_rule_params.h"
#include "attnx/jvp_params.h"
#include "attnx/linear_state_params.h"
#include "attnx/params.h"
#include "attnx/range_means_params.h"
#include "attnx/weights_params.h"
#include "block_products.h"
#include "executor.h"

namespace attnx::cpu {

// These are the kernels of the loop, each of which is compiled for one dtype.
#define ATTNX_FOR_EACH_LOOP(X)           \
  X(forward, ForwardParams)              \
  X(backward, BackwardParams)            \
  X(band_forward, ForwardParams)         \
  X(band_backward, BackwardParams)       \
  X(forward_with_terms, ForwardParams)   \
  X(backward_with_terms, BackwardParams) \
  X(routed_forward, ForwardParams)       \
  X(routed_backward, BackwardParams)     \
  X(jvp, JvpParams)

// These are the kernels beside it, each of which serves all dtypes, with a switch.
#define ATTNX_FOR_EACH_OTHER(X)                       \
  X(block_products, BlockProductsParams)              \
  X(key_weights, KeyWeightsParams)                    \
  X(row_weights, RowWeightsParams)                    \
  X(max_logits, MaxLogitsParams)                      \
  X(chosen_keys, ChosenKeysParams)                    \
  X(softplus_rows, SoftplusRowsParams)                \
  X(linear_forward, LinearForwardParams)              \
  X(linear_backward, LinearBackwardParams)            \
  X(delta_rule_forward, DeltaRuleForwardParams)       \
  X(delta_rule_backward, DeltaRuleBackwardParams)     \
  X(linear_state_forward, LinearStateForwardParams)   \
  X(linear_state_backward, LinearStateBackwardParams) \
  X(range_means, RangeMeansParams)                    \
  X(select, SelectParams)                             \
  X(nearest, NearestParams)                           \
  X(centroid_sums, CentroidSumsParams)                \
  X(staircase_append, StaircaseAppendParams)          \
  X(staircase_crop, StaircaseCropParams)              \
  X(staircase_read, StaircaseReadParams)

#define ATTNX_FOR_EACH_KERNEL(X) ATTNX_FOR_EACH_LOOP(X) ATTNX_FOR_EACH_OTHER(X)

// Each kernel has a function that runs it, and one that tells how many bytes of workspace it needs, aligned to 64.
struct Kernels {
#define ATTNX_MEMBERS(name, Params)                                \
  std::size_t (*name##_workspace)(const Params&, const Executor&); \
  void (*name)(const Params&, const Executor&, char* workspace);
  ATTNX_FOR_EACH_KERNEL(ATTNX_MEMBERS)
#undef ATTNX_MEMBERS
};

}  // namespace attnx::cpu
