// The arguments that every attention operator shares: checked, then written into AttentionParams.
#pragma once

#include <optional>

#include "attnx/params.h"
#include "check.h"

namespace attnx::ops {

// Sequences packed end to end: (rows, heads, dim) tensors.
struct Packing {
  const StableTensor &cu_seqlens_q, &cu_seqlens_k;
  std::int64_t max_seqlen_q, max_seqlen_k;
};

struct Arguments {
  const StableTensor &query, &key, &value;
  const Packing* packing = nullptr;  // null: (batch, heads, length, dim)
  const std::optional<StableTensor>& alibi_slopes;
  std::optional<double> scale;
  bool is_causal;
  std::int64_t window_left, window_right;
  const char* op = nullptr;  // its name in the capability table, where that is not the score's
};

// Checks all of them and fills what AttentionParams holds of them.
void read_arguments(const Arguments& args, AttentionParams& params);

// What the sigmoid adds to its logits. rule is "none", "length" or "row".
void read_bias(const std::optional<StableTensor>& bias, const std::string& rule, double value,
               const StableTensor& query, AttentionParams& params);

// A tensor of the shape of the output, or of its rows, that a backward gets.
Tensor read_output(const char* name, const StableTensor& x, const Arguments& args);
Tensor read_logsumexp(const char* name, const StableTensor& x, const Arguments& args);

// Results, uninitialised. Rows of dim features for each row of like, with the heads inside the rows in memory where
// like has them so.
StableTensor empty_rows(const StableTensor& like, std::int64_t dim);
StableTensor empty_logsumexp(const StableTensor& query);
Tensor view_rows(const StableTensor& x);
Tensor view_logsumexp(const StableTensor& x);

// The gradient of a bias or of slopes as the kernel sums it, for each sequence: (batch, heads) in double. None where
// the call has no such tensor.
std::optional<StableTensor> empty_sums(const std::optional<StableTensor>& parameter, const StableTensor& query,
                                       const AttentionParams& params);
double* view_sums(const std::optional<StableTensor>& sums);

}  // namespace attnx::ops
