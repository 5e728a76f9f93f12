// This file registers torch.ops.attnx.attention_key_weights, attention_row_weights, attention_max_logits and
// pointer_sample, which tell about the weights of an attention without its values.
#include <cmath>

#include "terms.h"

namespace attnx::ops {

namespace {

struct Operands {
  StableTensor query, key;
  ATTNX_FIELDS(query, key)
};
struct Logsumexp {
  std::optional<StableTensor> logsumexp;
  ATTNX_FIELDS(logsumexp)
};
struct RowFactors {
  std::optional<StableTensor> row_weights;
  ATTNX_FIELDS(row_weights)
};

// Each logit gets temperature times a draw; 0: none is drawn.
struct Choice {
  std::optional<double> softcap;
  std::optional<StableTensor> attn_mask, key_bias, key_mask;
  double temperature;
  std::optional<StableTensor> seed, offset;
  ATTNX_FIELDS(softcap, attn_mask, key_bias, key_mask, temperature, seed, offset)
};

void read(const Target& target, const Operands& x, const Window& window, WeightsParams& p) {
  read_inputs(target, {x.query, x.key, x.key}, Dense(), p);
  read_window(window, p);
}

// Normalised scores need it, and others have none.
void read_logsumexp(const Logsumexp& x, const StableTensor& query, WeightsParams& p) {
  const auto& [logsumexp] = x;
  if (!is_normalised(p.score)) return check(!logsumexp, "logsumexp: expected None with score sigmoid, got a tensor");
  check(logsumexp.has_value(), "logsumexp: expected a tensor with score softmax, got None");
  check_dtype("logsumexp", *logsumexp, sum_type(query), " (the type of the sums)");
  check_shape("logsumexp", *logsumexp, {p.batch, p.heads_q, p.length_q});
  check_layout("logsumexp", *logsumexp);
  p.logsumexp = view_logsumexp(*logsumexp);
}

void read_row_weights(const RowFactors& x, const StableTensor& query, KeyWeightsParams& p) {
  const auto& [weights] = x;
  if (!weights) return;
  check_dtype("row_weights", *weights, sum_type(query), " (the type of the sums)");
  check(weights->dim() == 3 && (weights->size(0) == 1 || weights->size(0) == p.batch) &&
            (weights->size(1) == 1 || weights->size(1) == p.heads_q) && weights->size(2) == p.length_q,
        "row_weights: expected shape (", p.batch, " or 1, ", p.heads_q, " or 1, ", p.length_q, "), got ",
        shape_of(*weights));
  check_layout("row_weights", *weights);
  const auto stride = [&](std::int64_t dim) { return weights->size(dim) == 1 ? 0 : weights->stride(dim); };
  p.row_weights = {weights->data_ptr(), stride(0), stride(1)};
}

void read_choice(const Target& target, const Choice& x, ChosenKeysParams& p) {
  read_terms(target, PairTerms{x.attn_mask, {}, {}}, p);
  read_terms(target, Terms{x.softcap, x.key_bias, x.key_mask, 0, {}, {}}, p);
  check(x.temperature >= 0 && std::isfinite(x.temperature), "temperature: expected a finite number from 0 on, got ",
        x.temperature);
  p.temperature = x.temperature;
  if (x.temperature == 0) return;
  check(x.seed && x.offset, x.seed ? "offset" : "seed", ": expected a tensor with a temperature above 0, got None");
  check_round(*x.seed, *x.offset);
  p.seed = data<const std::int64_t>(*x.seed);
  p.offset = data<const std::int64_t>(*x.offset);
}

StableTensor empty_result(const StableTensor& query, const std::vector<std::int64_t>& shape, WeightsParams& p) {
  StableTensor result = make_empty(query, shape, sum_type(query));
  p.result = result.data_ptr();
  return result;
}

StableTensor key_weights(const Operands& x, const Logsumexp& logsumexp, const RowFactors& factors,
                         const ScoreOptions& options, const Window& window) {
  const Target target{"attention_key_weights", x.query};
  KeyWeightsParams p;
  read_score(options, p);
  read(target, x, window, p);
  read_logsumexp(logsumexp, x.query, p);
  read_row_weights(factors, x.query, p);
  StableTensor result = empty_result(x.query, {p.batch, p.heads_q, p.length_k}, p);
  run(p, target);
  return result;
}

StableTensor row_weights(const Operands& x, const Logsumexp& logsumexp, const ScoreOptions& options,
                         const Window& window) {
  const Target target{"attention_row_weights", x.query};
  RowWeightsParams p;
  read_score(options, p);
  read(target, x, window, p);
  read_logsumexp(logsumexp, x.query, p);
  StableTensor result = empty_result(x.query, {p.batch, p.heads_q, p.length_q, p.length_k}, p);
  run(p, target);
  return result;
}

StableTensor max_logits(const Operands& x, const Window& window) {
  const Target target{"attention_max_logits", x.query};
  MaxLogitsParams p;
  p.score = Score::kSoftmax;
  read(target, x, window, p);
  StableTensor result = empty_result(x.query, {p.batch, p.heads_q, p.length_q}, p);
  run(p, target);
  return result;
}

StableTensor sample(const Operands& x, const Choice& choice, const Window& window) {
  const Target target{"pointer_sample", x.query};
  ChosenKeysParams p;
  p.score = Score::kSoftmax;
  read(target, x, window, p);
  read_choice(target, choice, p);
  StableTensor result = make_empty(x.query, {p.batch, p.heads_q, p.length_q}, ScalarType::Long);
  p.result = result.data_ptr();
  run(p, target);
  return result;
}

const Registration registration_of_keys("attention_key_weights", OnHost::kRefused,
                                        {define<key_weights>("attention_key_weights")});
const Registration registration_of_rows("attention_row_weights", OnHost::kRefused,
                                        {define<row_weights>("attention_row_weights")});
const Registration registration_of_maxima("attention_max_logits", OnHost::kRefused,
                                          {define<max_logits>("attention_max_logits")});
const Registration registration_of_choices("pointer_sample", OnHost::kRefused, {define<sample>("pointer_sample")});

}  // namespace

}  // namespace attnx::ops
