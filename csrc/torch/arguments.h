// These are the groups of arguments that operators share. They are checked, then written into AttentionParams.
#pragma once

#include "attnx/block_labels.h"
#include "attnx/params.h"
#include "backend.h"
#include "operator.h"

namespace attnx::ops {

struct Inputs {
  StableTensor query, key, value;
  ATTNX_FIELDS(query, key, value)
};

// Sequences lie in memory as (batch, heads, length, dim), or packed end to end as (rows, heads, dim).
struct Dense {
  ATTNX_FIELDS()
};
// The keys of sequence b may be the rows [leftpad_k[b], seqused_k[b]) alone.
struct DenseWithLengths {
  std::optional<StableTensor> seqused_k, leftpad_k;
  ATTNX_FIELDS(seqused_k, leftpad_k)
};
struct Packed {
  StableTensor cu_seqlens_q, cu_seqlens_k;
  SymInt max_seqlen_q, max_seqlen_k;
  ATTNX_FIELDS(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
};

// Packed tensors may have rows of no sequence after the last one, where has_padding says so.
struct PackedWithPadding {
  StableTensor cu_seqlens_q, cu_seqlens_k;
  SymInt max_seqlen_q, max_seqlen_k;
  bool has_padding;
  ATTNX_FIELDS(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, has_padding)
};

struct Window {
  std::optional<double> scale;
  bool is_causal;
  std::int64_t window_left, window_right;
  SymInt position_offset;
  ATTNX_FIELDS(scale, is_causal, window_left, window_right, position_offset)
};
struct Causal {
  std::optional<double> scale;
  bool is_causal;
  ATTNX_FIELDS(scale, is_causal)
};

struct BlockSize {
  std::int64_t block_q, block_k;
  ATTNX_FIELDS(block_q, block_k)
};

// Operators that have a choice of scores take these.
struct ScoreOptions {
  std::string score, bias_rule;
  double bias_value;
  ATTNX_FIELDS(score, bias_rule, bias_value)
};

struct Deterministic {
  bool deterministic;
  ATTNX_FIELDS(deterministic)
};

// This is an optional number for each query head. The template's arguments say where AttentionParams holds it, and
// where BackwardParams holds its gradient.
template <PerHead AttentionParams::* kPlace, double* BackwardParams::* kGradientPlace>
struct HeadParameter {
  using OnStack = std::optional<StableTensor>;
  static constexpr const char* kSchemaType = "Tensor?";
  static constexpr auto kValue = kPlace;
  static constexpr auto kGradient = kGradientPlace;

  std::optional<StableTensor> tensor;
};
using Bias = HeadParameter<&AttentionParams::bias, &BackwardParams::grad_bias>;
using AlibiSlopes = HeadParameter<&AttentionParams::alibi_slopes, &BackwardParams::grad_alibi_slopes>;
using Sink = HeadParameter<&AttentionParams::sink, &BackwardParams::grad_sink>;

// It calls visit(name, parameter) for each field of a group that is a number for each head.
template <class Group, class Visit>
void for_each_head_parameter(Group& group, const Visit& visit) {
  for_each_field(group, [&](std::string_view name, auto& field) {
    if constexpr (requires { field.kGradient; }) visit(name, field);
  });
}

Score read_score(const std::string& score);
// It checks the offsets of packed queries and keys, of so many rows, and returns lengths that none of their sequences
// exceeds.
std::pair<std::int64_t, std::int64_t> read_packing(const Target& target, const PackedWithPadding& packed,
                                                   std::int64_t rows_q, std::int64_t rows_k);
void read_inputs(const Target& target, const Inputs& inputs, const Packed* packed, AttentionParams& params);
inline void read_inputs(const Target& target, const Inputs& inputs, const Dense&, AttentionParams& params) {
  read_inputs(target, inputs, nullptr, params);
}
void read_key_lengths(const DenseWithLengths& dense, AttentionParams& params);
inline void read_inputs(const Target& target, const Inputs& inputs, const DenseWithLengths& dense,
                        AttentionParams& params) {
  read_inputs(target, inputs, nullptr, params);
  read_key_lengths(dense, params);
}
inline void read_inputs(const Target& target, const Inputs& inputs, const Packed& packed, AttentionParams& params) {
  read_inputs(target, inputs, &packed, params);
}
inline void read_inputs(const Target& target, const Inputs& inputs, const PackedWithPadding& x,
                        AttentionParams& params) {
  params.has_padding = x.has_padding;
  read_inputs(target, inputs, Packed{x.cu_seqlens_q, x.cu_seqlens_k, x.max_seqlen_q, x.max_seqlen_k}, params);
}
// It is 1 / sqrt(head_dim) where none is given.
double read_scale(const std::optional<double>& given, DType dtype, std::int64_t head_dim);
// The inputs are read before, because the default scale comes from their head_dim.
void read_window(const Window& window, AttentionParams& params);
inline void read_window(const Causal& causal, AttentionParams& params) {
  read_window({causal.scale, causal.is_causal, -1, -1, {0}}, params);
}
// The rule and the value say what the sigmoid adds to its logits. The rule is "none", "length" or "row".
void read_bias(const std::string& rule, double value, AttentionParams& params);
inline void read_score(const ScoreOptions& options, AttentionParams& params) {
  params.score = read_score(options.score);
  check(!is_normalised(params.score) || (options.bias_rule == "none" && options.bias_value == 0),
        "bias: expected none with score ", options.score, ", got bias_rule ", options.bias_rule, " and bias_value ",
        options.bias_value);
  read_bias(options.bias_rule, options.bias_value, params);
}
// A sink turns softmax into softmax with a sink; no other score has one. The score is read before.
void read_sink(const Sink& sink, AttentionParams& params);
void check_block_size(const BlockSize& size);
void read_block_size(const BlockSize& size, AttentionParams& params);

BlockShares read_shares(double critical, double negligible, std::string_view rounding, std::int64_t protect);

PerHead read_per_head(std::string_view name, const std::optional<StableTensor>& x, const StableTensor& query,
                      std::int64_t heads);
template <class Group>
void read_head_parameters(const Target& target, const Group& group, AttentionParams& params) {
  for_each_head_parameter(group, [&](std::string_view name, const auto& parameter) {
    params.*parameter.kValue = read_per_head(name, parameter.tensor, target.tensor, params.heads_q);
  });
}

Tensor view_rows(const StableTensor& x);
Tensor view_logsumexp(const StableTensor& x);
// The counts are (batch or 1, heads or 1, blocks), and the indices (batch or 1, heads or 1, blocks, width).
BlockList view_lists(const StableTensor& counts, const StableTensor& indices);
// It puts numbers of listed blocks, (batch or 1, heads or 1, blocks, width), in one of the two places that the list has
// for them.
void add_per_block(const StableTensor& numbers, const float*& place, BlockList& list);

std::int64_t blocks_of(std::int64_t length, std::int64_t block);

}  // namespace attnx::ops
