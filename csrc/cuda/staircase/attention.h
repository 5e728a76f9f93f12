// This launches attention over a staircase cache, the forward of calls that have one.
#pragma once

#include "cuda/attention.h"

namespace attnx::cuda {

std::size_t staircase_attention_workspace(const ForwardParams& params, const Launch& launch);
void staircase_attention(const ForwardParams& params, const Launch& launch);
KernelDescription describe_staircase(const ForwardParams& params);

}  // namespace attnx::cuda
