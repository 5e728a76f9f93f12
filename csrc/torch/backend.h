// This chooses the kernels that serve a call, and runs them.
#pragma once

#include "attnx/block_params.h"
#include "attnx/cluster_params.h"
#include "attnx/delta_rule_params.h"
#include "attnx/jvp_params.h"
#include "attnx/linear_state_params.h"
#include "attnx/params.h"
#include "attnx/range_means_params.h"
#include "attnx/weights_params.h"
#include "check.h"
#include "memory.h"

namespace attnx {
struct Capability;
}

namespace attnx::ops {

// A target says which operator a call belongs to, and where it runs.
struct Target {
  const char* system;          // its operator in the capability table
  const StableTensor& tensor;  // its device, and the stream there, are meant
  bool deterministic = false;

  // It tells whether the CUDA kernels serve the call, or else those of the CPU.
  bool on_cuda() const;
  const Capability& capability() const;
};

#define ATTNX_FOR_EACH_RUN(X)                         \
  X(forward, ForwardParams)                           \
  X(backward, BackwardParams)                         \
  X(jvp, JvpParams)                                   \
  X(sum_over_batch, SumOverBatchParams)               \
  X(block_map, BlockMapParams)                        \
  X(key_weights, KeyWeightsParams)                    \
  X(row_weights, RowWeightsParams)                    \
  X(max_logits, MaxLogitsParams)                      \
  X(chosen_keys, ChosenKeysParams)                    \
  X(softplus_rows, SoftplusRowsParams)                \
  X(label_blocks, LabelBlocksParams)                  \
  X(critical_blocks, CriticalBlocksParams)            \
  X(linear_forward, LinearForwardParams)              \
  X(linear_backward, LinearBackwardParams)            \
  X(delta_rule_forward, DeltaRuleForwardParams)       \
  X(delta_rule_backward, DeltaRuleBackwardParams)     \
  X(linear_state_forward, LinearStateForwardParams)   \
  X(linear_state_backward, LinearStateBackwardParams) \
  X(range_means, RangeMeansParams)                    \
  X(sample_blocks, SampleBlocksParams)                \
  X(select, SelectParams)                             \
  X(compact_clusters, CompactClustersParams)          \
  X(nearest, NearestParams)                           \
  X(sort_by_cluster, SortByClusterParams)             \
  X(centroid_sums, CentroidSumsParams)                \
  X(halve_sums, HalveSumsParams)                      \
  X(update_centroids, UpdateCentroidsParams)          \
  X(staircase_append, StaircaseAppendParams)          \
  X(staircase_crop, StaircaseCropParams)              \
  X(staircase_read, StaircaseReadParams)

// Each of these enqueues the CUDA kernel on the current stream of the target's device, or runs the CPU's on torch's
// threads.
#define ATTNX_DECLARE(name, Params) void run(const Params& params, const Target& target);
ATTNX_FOR_EACH_RUN(ATTNX_DECLARE)
#undef ATTNX_DECLARE

// These two need nothing of each other. The CPU runs them in one parallel region.
void run(const ForwardParams& params, const LinearForwardParams& linear, const Target& target);

}  // namespace attnx::ops
