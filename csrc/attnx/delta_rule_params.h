// These kernels run the gated delta rule: a state of each head, [key_dim, value_dim], that decays and is corrected by
// every token.
#pragma once

#include "attnx/params.h"

namespace attnx {

// Longer sequences go through chunks of so many tokens.
inline constexpr std::int64_t kDeltaRuleChunk = 64;

// A row that is brought to norm 1 is divided by the square root of this and its sum of squares.
inline constexpr double kDeltaRuleEpsilon = 1e-6;

// This is one number for each token, or chunk, of a head, in the accumulator's type. Strides count elements.
struct PerToken {
  void* data = nullptr;
  std::int64_t batch_stride = 0, head_stride = 0, row_stride = 0;
};

// Token by token, S <- e^log_decay S, d = value - S^T key, S <- S + beta key d^T, output = scale S^T query. A head of
// keys and queries serves heads_v / heads_k consecutive heads of values, each of which has a state. Behind chunk c the
// state is that before it, decayed, and carry[c] times what the chunk added.
struct DeltaRuleParams {
  DType dtype = DType::kFloat32;
  std::int64_t batch = 0, heads_k = 0, heads_v = 0, length = 0, key_dim = 0, value_dim = 0;
  double scale = 1;
  bool normalize = false;    // queries and keys come to a norm of 1, see kDeltaRuleEpsilon
  Tensor query, key;         // [batch, heads_k, length, key_dim]
  Tensor value;              // [batch, heads_v, length, value_dim]
  PerToken log_decay, beta;  // [batch, heads_v, length]; no log_decay is above 0
  Tensor initial_state;      // [batch, heads_v, key_dim, value_dim] in the accumulator's type; null: zeros
  PerToken carry;            // [batch, heads_v, chunks]; null: ones

  std::int64_t chunks() const { return (length + kDeltaRuleChunk - 1) / kDeltaRuleChunk; }
};

struct DeltaRuleForwardParams : DeltaRuleParams {
  Tensor output;          // like value
  void* state = nullptr;  // after the last token, like initial_state and contiguous
};

struct DeltaRuleBackwardParams : DeltaRuleParams {
  Tensor grad_output;  // like value; null: zeros
  Tensor grad_state;   // like initial_state; null: zeros
  Tensor grad_query, grad_key, grad_value;
  // These are contiguous, in the accumulator's type.
  void *grad_log_decay = nullptr, *grad_beta = nullptr, *grad_initial_state = nullptr;
  void* grad_carry = nullptr;  // likewise; null where there is no carry
};

}  // namespace attnx
