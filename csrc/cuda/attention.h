// These are the CUDA kernels' entry points. They launch on a stream and return: they neither synchronise nor allocate.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "attnx/jvp_params.h"
#include "attnx/params.h"
#include "attnx/weights_params.h"
#include "cuda/common/launch.h"
#include "cuda/delta_rule/delta_rule.h"
#include "cuda/labels/block_map.h"
#include "cuda/labels/critical_blocks.h"
#include "cuda/labels/label_blocks.h"
#include "cuda/linear/linear.h"
#include "cuda/linear_state/linear_state.h"
#include "cuda/passes/sum_over_batch.h"
#include "cuda/pooling/range_means.h"
#include "cuda/routing/routing.h"
#include "cuda/sampling/sample_blocks.h"
#include "cuda/score/sigmoid_weights.h"
#include "cuda/staircase/staircase.h"

namespace attnx::cuda {

// Forward and backward need this much device memory besides their tensors, in bytes, on the current device.
std::size_t forward_workspace(const ForwardParams& params, const Launch& launch);
std::size_t backward_workspace(const BackwardParams& params, const Launch& launch);

// They throw std::runtime_error with the kernel's name where the device has no kernel or the runtime reports an error.
void forward(const ForwardParams& params, const Launch& launch);
void backward(const BackwardParams& params, const Launch& launch);

// This is the forward and its derivative along a direction.
std::size_t jvp_workspace(const JvpParams& params, const Launch& launch);
void jvp(const JvpParams& params, const Launch& launch);

// These tell about weights, and largest logits and their keys, without values.
std::size_t key_weights_workspace(const KeyWeightsParams& params, const Launch& launch);
std::size_t row_weights_workspace(const RowWeightsParams& params, const Launch& launch);
std::size_t max_logits_workspace(const MaxLogitsParams& params, const Launch& launch);
std::size_t chosen_keys_workspace(const ChosenKeysParams& params, const Launch& launch);
void key_weights(const KeyWeightsParams& params, const Launch& launch);
void row_weights(const RowWeightsParams& params, const Launch& launch);
void max_logits(const MaxLogitsParams& params, const Launch& launch);
std::size_t softplus_rows_workspace(const SoftplusRowsParams& params, const Launch& launch);
void softplus_rows(const SoftplusRowsParams& params, const Launch& launch);
void chosen_keys(const ChosenKeysParams& params, const Launch& launch);

// This describes the kernel that a call would run.
struct KernelDescription {
  std::string kernel;        // as profilers show it: "attnx_forward_sm80"
  std::string mainloop;      // "sm80"
  int rows = 0, keys = 0;    // of a tile
  int head_dim = 0;          // what it is padded to
  bool aligned = true;       // whether rows lie on 16 bytes
  int splits = 1;            // shares of the keys
  std::string why_not_sm90;  // on a device that could run it
};
KernelDescription describe(const ForwardParams& params);
KernelDescription describe(const BackwardParams& params);

}  // namespace attnx::cuda
