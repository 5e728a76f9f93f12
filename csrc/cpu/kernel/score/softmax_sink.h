// This is the softmax of the logits of a row and one more, the sink of its head, which takes weight and has no value.
//
// The running maximum and sum of softmax begin with the sink instead of nothing, and its backward needs no more than a
// logsumexp that includes the sink. So softmax's loops serve it as they are, and are compiled once.
#pragma once

#include "softmax.h"

namespace attnx::cpu::ATTNX_ISA {

using SoftmaxSink = Softmax;

}  // namespace attnx::cpu::ATTNX_ISA
