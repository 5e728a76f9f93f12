// The derivative of attention along a direction, beside attention itself.
#pragma once

#include "attnx/params.h"

namespace attnx {

// tangent_query, tangent_key and tangent_value are the directions, like query, key and value; a null one is zero, and
// its products are left out. Logits have no terms, and there are no lists of blocks.
struct JvpParams : ForwardParams {
  Tensor tangent_query, tangent_key, tangent_value;

  Tensor tangent_output;     // like output
  Tensor tangent_logsumexp;  // like logsumexp

  bool moves_logits() const { return tangent_query.data || tangent_key.data; }
};

}  // namespace attnx
