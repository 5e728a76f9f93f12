// Which kernels serve a call, and running them.
#pragma once

#include <optional>

#include "attnx/block_params.h"
#include "attnx/cluster_params.h"
#include "attnx/params.h"
#include "check.h"

namespace attnx::ops {

// Whether the CUDA kernels serve calls on tensors that lie where query does, or else those of the CPU.
bool uses_cuda(const StableTensor& query);

// Enqueue the CUDA kernel on the current stream of query's device, or run the CPU's on torch's threads.
void run(const ForwardParams& params, const StableTensor& query);
void run(const BackwardParams& params, const StableTensor& query, bool deterministic);
// On the CPU alone, today.
void run(const LinearForwardParams& params);
void run(const LinearBackwardParams& params);
void run(const SelectParams& params);
void run(const NearestParams& params);
void run(const CentroidSumsParams& params);
void run(const LabelBlocksParams& params);
void run(const CriticalBlocksParams& params);
void run(const SampleBlocksParams& params);
void run(const CorrectionParams& params);
void run(const CompactClustersParams& params);
void run(const SortByClusterParams& params);
void run(const HalveSumsParams& params);
void run(const UpdateCentroidsParams& params);
void run(const StaircaseAppendParams& params);
void run(const StaircaseCropParams& params);
void run(const StaircaseReadParams& params);
void run_on_host(const ForwardParams& params);

// (heads,) in the type of sums, from the kernel's sums for each sequence, (batch, heads) in double; zeros from none.
StableTensor sum_over_batch(const std::optional<StableTensor>& per_sequence, const StableTensor& query);

// The type sums are kept in, which bias, slopes and logsumexp have.
ScalarType sum_type(const StableTensor& query);

}  // namespace attnx::ops
