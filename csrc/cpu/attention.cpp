#include "attention.h"

#include "dispatch.h"

namespace attnx::cpu {

namespace {

double operations(const AttentionParams& p) {
  const std::int64_t rows = p.gather ? p.gather->queries.slots : p.length_q;
  return 2.0 * double(p.batch * p.heads_q) * double(rows) * double(p.length_k) * double(p.head_dim + p.value_dim);
}
double operations(const LinearParams& p) {
  return 2.0 * double(p.batch) * double(p.heads_q * p.length_q + p.heads_k * p.length_k) *
         double(p.head_dim * p.value_dim);
}
double operations(const DeltaRuleParams& p) {
  return 8.0 * double(p.batch * p.heads_v) * double(p.length) * double(p.key_dim * p.value_dim);
}
double operations(const LinearStateParams& p) {
  return 2.0 * double(p.batch) * double(p.heads_q * p.length_q + p.heads_k * p.length_k) *
         double(p.features() * (p.value_dim + 1));
}

}  // namespace

void range_means(const RangeMeansParams& p, const Executor& executor) {
  // Ranges may be of any rows; those of all are a guess.
  const double operations = double(p.batch * p.heads) * double(p.length * p.dim) * (p.deviations ? 4 : 1);
  run(&Kernels::range_means_workspace, &Kernels::range_means, p, executor, operations);
}

void forward(const ForwardParams& p, const Executor& executor) {
  if (p.gather) {
    run(&Kernels::routed_forward_workspace, &Kernels::routed_forward, p, executor, operations(p));
  } else if (is_band_only(p.score)) {
    run(&Kernels::band_forward_workspace, &Kernels::band_forward, p, executor, operations(p));
  } else if (p.terms.any()) {
    run(&Kernels::forward_with_terms_workspace, &Kernels::forward_with_terms, p, executor, operations(p));
  } else {
    run(&Kernels::forward_workspace, &Kernels::forward, p, executor, operations(p));
  }
}

void backward(const BackwardParams& p, const Executor& executor) {
  if (p.gather) {
    run(&Kernels::routed_backward_workspace, &Kernels::routed_backward, p, executor, operations(p));
  } else if (is_band_only(p.score)) {
    run(&Kernels::band_backward_workspace, &Kernels::band_backward, p, executor, operations(p));
  } else if (p.terms.any()) {
    run(&Kernels::backward_with_terms_workspace, &Kernels::backward_with_terms, p, executor, operations(p));
  } else {
    run(&Kernels::backward_workspace, &Kernels::backward, p, executor, operations(p));
  }
}

void jvp(const JvpParams& p, const Executor& executor) {
  run(&Kernels::jvp_workspace, &Kernels::jvp, p, executor, 3 * operations(p));
}

void key_weights(const KeyWeightsParams& p, const Executor& executor) {
  run(&Kernels::key_weights_workspace, &Kernels::key_weights, p, executor, operations(p) / 2);
}

void row_weights(const RowWeightsParams& p, const Executor& executor) {
  run(&Kernels::row_weights_workspace, &Kernels::row_weights, p, executor, operations(p) / 2);
}

void max_logits(const MaxLogitsParams& p, const Executor& executor) {
  run(&Kernels::max_logits_workspace, &Kernels::max_logits, p, executor, operations(p) / 2);
}

void chosen_keys(const ChosenKeysParams& p, const Executor& executor) {
  run(&Kernels::chosen_keys_workspace, &Kernels::chosen_keys, p, executor, operations(p) / 2);
}

void softplus_rows(const SoftplusRowsParams& p, const Executor& executor) {
  run(&Kernels::softplus_rows_workspace, &Kernels::softplus_rows, p, executor, operations(p) / 2);
}

void linear_forward(const LinearForwardParams& p, const Executor& executor) {
  run(&Kernels::linear_forward_workspace, &Kernels::linear_forward, p, executor, operations(p));
}

void linear_backward(const LinearBackwardParams& p, const Executor& executor) {
  run(&Kernels::linear_backward_workspace, &Kernels::linear_backward, p, executor, operations(p));
}

void delta_rule_forward(const DeltaRuleForwardParams& p, const Executor& executor) {
  run(&Kernels::delta_rule_forward_workspace, &Kernels::delta_rule_forward, p, executor, operations(p));
}

void delta_rule_backward(const DeltaRuleBackwardParams& p, const Executor& executor) {
  run(&Kernels::delta_rule_backward_workspace, &Kernels::delta_rule_backward, p, executor, 3 * operations(p));
}

void linear_state_forward(const LinearStateForwardParams& p, const Executor& executor) {
  run(&Kernels::linear_state_forward_workspace, &Kernels::linear_state_forward, p, executor, operations(p));
}

void linear_state_backward(const LinearStateBackwardParams& p, const Executor& executor) {
  run(&Kernels::linear_state_backward_workspace, &Kernels::linear_state_backward, p, executor, 3 * operations(p));
}

}  // namespace attnx::cpu
