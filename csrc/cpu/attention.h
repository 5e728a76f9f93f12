// Attention runs on the CPU by the kernels of one instruction set, which is chosen at run time.
#pragma once

#include <string>
#include <vector>

#include "attnx/api.h"
#include "attnx/block_params.h"
#include "attnx/cluster_params.h"
#include "attnx/delta_rule_params.h"
#include "attnx/jvp_params.h"
#include "attnx/linear_state_params.h"
#include "attnx/params.h"
#include "attnx/range_means_params.h"
#include "attnx/weights_params.h"
#include "executor.h"

namespace attnx::cpu {

// All of these run on as many of the executor's threads as the work is worth.
void forward(const ForwardParams& params, const Executor& executor);
void backward(const BackwardParams& params, const Executor& executor);
// This runs the forward, and its derivative along a direction.
void jvp(const JvpParams& params, const Executor& executor);
void sum_over_batch(const SumOverBatchParams& params, const Executor& executor);

// These tell about weights, and largest logits and their keys, without values.
void key_weights(const KeyWeightsParams& params, const Executor& executor);
void row_weights(const RowWeightsParams& params, const Executor& executor);
void max_logits(const MaxLogitsParams& params, const Executor& executor);
void chosen_keys(const ChosenKeysParams& params, const Executor& executor);
void softplus_rows(const SoftplusRowsParams& params, const Executor& executor);

// These make the map of sparse-linear attention, and its linear part.
void block_map(const BlockMapParams& params, const Executor& executor);
void label_blocks(const LabelBlocksParams& params, const Executor& executor);
void critical_blocks(const CriticalBlocksParams& params, const Executor& executor);
void linear_forward(const LinearForwardParams& params, const Executor& executor);
void linear_backward(const LinearBackwardParams& params, const Executor& executor);

// These run the gated delta rule.
void delta_rule_forward(const DeltaRuleForwardParams& params, const Executor& executor);
void delta_rule_backward(const DeltaRuleBackwardParams& params, const Executor& executor);

// These run linear attention with a state.
void linear_state_forward(const LinearStateForwardParams& params, const Executor& executor);
void linear_state_backward(const LinearStateBackwardParams& params, const Executor& executor);

// This pools rows.
void range_means(const RangeMeansParams& params, const Executor& executor);

// This draws the blocks of probabilistic attention, and makes up for the others.
void sample_blocks(const SampleBlocksParams& params, const Executor& executor);

// These make the clusters of routing attention, and move their centroids.
void select(const SelectParams& params, const Executor& executor);
void compact_clusters(const CompactClustersParams& params, const Executor& executor);
void nearest(const NearestParams& params, const Executor& executor);
void sort_by_cluster(const SortByClusterParams& params, const Executor& executor);
void centroid_sums(const CentroidSumsParams& params, const Executor& executor);
void halve_sums(const HalveSumsParams& params, const Executor& executor);
void update_centroids(const UpdateCentroidsParams& params, const Executor& executor);

// These serve the staircase cache.
void staircase_append(const StaircaseAppendParams& params, const Executor& executor);
void staircase_crop(const StaircaseCropParams& params, const Executor& executor);
void staircase_read(const StaircaseReadParams& params, const Executor& executor);

// It lists the instruction sets that were built and that this machine runs, the plainest first.
ATTNX_API std::vector<std::string> instruction_sets();
// It returns the one in use: the last of them, or what ATTNX_CPU_ISA names.
ATTNX_API std::string instruction_set();
// It is for tests and comparisons, and throws std::invalid_argument for a name that instruction_sets() does not list.
ATTNX_API void use_instruction_set(const std::string& name);

}  // namespace attnx::cpu
