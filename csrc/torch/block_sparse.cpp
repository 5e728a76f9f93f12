// This file registers torch.ops.attnx.block_sparse_attention and its packed and backward forms, which apply either
// score to the blocks that a list names.
#include <algorithm>
#include <tuple>

#include "results.h"
#include "terms.h"

namespace attnx::ops {

namespace {

constexpr const char* kSystem = "block_sparse_attention";

struct KeyLists {
  StableTensor kv_num_blocks, kv_indices;
  std::optional<StableTensor> block_bias;
  ATTNX_FIELDS(kv_num_blocks, kv_indices, block_bias)
};

struct Additions {
  Sink sink;
  ATTNX_FIELDS(sink)
};

// These are the same lists transposed. CUDA needs them; the CPU sums the gradients of keys over blocks of queries as
// they come.
struct QueryLists {
  std::optional<StableTensor> q_num_blocks, q_indices, q_block_bias;
  ATTNX_FIELDS(q_num_blocks, q_indices, q_block_bias)
};

struct Wanted {
  bool block_bias_gradient;
  ATTNX_FIELDS(block_bias_gradient)
};

struct Lists {
  const char *counts_name, *indices_name, *bias_name;
  const StableTensor &counts, &indices;
  const std::optional<StableTensor>& bias;
};

// It checks, on values in host memory, that the first `count` indices of each row name blocks that exist. One of the
// two tensors may serve all heads, or all sequences, while the other does not.
void check_values(const Lists& lists, const StableTensor& counts, const StableTensor& indices, std::int64_t blocks) {
  const std::int64_t width = indices.size(3);
  const BlockList list = view_lists(counts, indices);
  for (std::int64_t b = 0; b < std::max(counts.size(0), indices.size(0)); ++b)
    for (std::int64_t h = 0; h < std::max(counts.size(1), indices.size(1)); ++h)
      for (std::int64_t i = 0; i < counts.size(2); ++i) {
        const std::int32_t* count = list.counts + b * list.counts_batch_stride + h * list.counts_head_stride + i;
        check(*count >= 0 && *count <= width, lists.counts_name, ": expected counts from 0 to the width of ",
              lists.indices_name, ", ", width, ", got ", *count, " at (", b, ", ", h, ", ", i, ")");
        const std::int32_t* row =
            list.indices + b * list.indices_batch_stride + h * list.indices_head_stride + i * list.indices_row_stride;
        for (std::int64_t n = 0; n < *count; ++n)
          check(row[n] >= 0 && row[n] < blocks, lists.indices_name, ": expected blocks from 0 to ", blocks - 1,
                ", got ", row[n], " at (", b, ", ", h, ", ", i, ", ", n, ")");
      }
}

// It reads lists that name some of `listed` blocks for each of `rows` blocks.
BlockList read_lists(const Lists& lists, const AttentionParams& p, std::int64_t rows, std::int64_t listed) {
  const auto check_list = [&](const char* name, const StableTensor& x, ScalarType dtype, std::int64_t rank) {
    check_dtype(name, x, dtype, "");
    check(x.dim() == rank && (x.size(0) == 1 || x.size(0) == p.batch) && (x.size(1) == 1 || x.size(1) == p.heads_q) &&
              x.size(2) == rows,
          name, ": expected shape (", p.batch, " or 1, ", p.heads_q, " or 1, ", rows, rank == 4 ? ", width)" : ")",
          ", got ", shape_of(x));
    check_layout(name, x);
  };
  check_list(lists.counts_name, lists.counts, ScalarType::Int, 3);
  check_list(lists.indices_name, lists.indices, ScalarType::Int, 4);
  BlockList list = view_lists(lists.counts, lists.indices);
  if (lists.bias) {
    check_list(lists.bias_name, *lists.bias, ScalarType::Float, 4);
    check(lists.bias->size(3) == lists.indices.size(3), lists.bias_name, ": expected the width of ", lists.indices_name,
          ", ", lists.indices.size(3), ", got ", lists.bias->size(3));
    add_per_block(*lists.bias, list.bias, list);
  }
  const auto counts = values_on_host(lists.counts), indices = values_on_host(lists.indices);
  if (counts && indices && p.batch > 0) check_values(lists, *counts, *indices, listed);
  return list;
}

// Lists are those of the lengths that a call names, also where no packed sequence is as long.
std::int64_t listed_keys(const DenseWithLengths&, const AttentionParams& p) { return p.length_k; }
std::int64_t listed_keys(const PackedWithPadding& packed, const AttentionParams&) { return packed.max_seqlen_k; }
void read_listed_lengths(const DenseWithLengths&, AttentionParams&) {}
void read_listed_lengths(const PackedWithPadding& packed, AttentionParams& p) {
  p.length_q = packed.max_seqlen_q;  // which the rows of the lists bound
  p.length_k = std::min<std::int64_t>(packed.max_seqlen_k, p.packed_rows_k);
}

template <class Layout>
void read(const Target& target, const Inputs& x, const Layout& layout, const KeyLists& lists,
          const Additions& additions, const typename PairTermsOf<Layout>::Terms& pairs, const Terms& terms,
          const BlockSize& size, const ScoreOptions& options, const Causal& causal, AttentionParams& p) {
  read_score(options, p);
  read_sink(additions.sink, p);
  read_inputs(target, x, layout, p);
  read_listed_lengths(layout, p);
  read_window(causal, p);
  read_head_parameters(target, additions, p);
  read_terms(target, pairs, p);
  read_terms(target, terms, p);
  read_block_size(size, p);
  p.key_blocks =
      read_lists({"kv_num_blocks", "kv_indices", "block_bias", lists.kv_num_blocks, lists.kv_indices, lists.block_bias},
                 p, blocks_of(p.length_q, p.block_q), blocks_of(listed_keys(layout, p), p.block_k));
}

template <class Layout>
Outputs forward(const Inputs& x, const Layout& layout, const KeyLists& lists, const Additions& additions,
                const typename PairTermsOf<Layout>::Terms& pairs, const Terms& terms, const BlockSize& size,
                const ScoreOptions& options, const Causal& causal) {
  const Target target{kSystem, x.query};
  ForwardParams p;
  read(target, x, layout, lists, additions, pairs, terms, size, options, causal, p);
  return run_forward(target, x, p);
}

struct BlockBiasGradient {
  StableTensor grad_block_bias;
  ATTNX_FIELDS(grad_block_bias)
};
template <class Layout>
using AllGradients = std::tuple<InputGradients, HeadGradients<Additions>, typename PairTermsOf<Layout>::Gradients,
                                TermGradients, BlockBiasGradient>;

// The gradient of block_bias is (batch, heads, rows, width) in float64, whatever of it one bias serves. It is empty
// where it is not wanted.
BlockBiasGradient empty_block_bias(const Target& target, bool wanted, BackwardParams& p) {
  std::vector<std::int64_t> shape{0};
  if (wanted) shape = {p.batch, p.heads_q, blocks_of(p.length_q, p.block_q), p.key_blocks.width};
  BlockBiasGradient gradient{make_zeros(target.tensor, shape, ScalarType::Double)};
  if (wanted) p.grad_block_bias = data<double>(gradient.grad_block_bias);
  return gradient;
}

template <class Layout>
AllGradients<Layout> backward(const OutputGradients& gradients, const Inputs& x, const Outputs& y, const Layout& layout,
                              const KeyLists& lists, const Additions& additions,
                              const typename PairTermsOf<Layout>::Terms& pairs, const Terms& terms,
                              const QueryLists& transposed, const BlockSize& size, const ScoreOptions& options,
                              const Causal& causal, const typename PairTermsOf<Layout>::Wanted& wanted_pairs,
                              const WantedTerms& wanted_terms, const Wanted& wanted, const Deterministic& option) {
  const Target target{kSystem, x.query, option.deterministic};
  check(!wanted.block_bias_gradient || lists.block_bias, "block_bias_gradient: expected False without block_bias");
  BackwardParams p;
  read(target, x, layout, lists, additions, pairs, terms, size, options, causal, p);
  if (target.on_cuda()) {
    const auto& [counts, indices, bias] = transposed;
    check(counts && indices, "q_num_blocks, q_indices: expected the transposed lists on CUDA, got None");
    p.query_blocks = read_lists({"q_num_blocks", "q_indices", "q_block_bias", *counts, *indices, bias}, p,
                                blocks_of(listed_keys(layout, p), p.block_k), blocks_of(p.length_q, p.block_q));
    // Their order in a deterministic backward is counted once for an entry, whichever heads it serves.
    const BlockList& list = p.query_blocks;
    check((list.counts_batch_stride == 0) == (list.indices_batch_stride == 0) &&
              (list.counts_head_stride == 0) == (list.indices_head_stride == 0),
          "q_indices: expected lists that serve the heads and sequences that q_num_blocks serves, got shape ",
          shape_of(*indices), " beside ", shape_of(*counts), ", or expanded ones");
  }
  read_outputs(gradients, y, x, p);
  const auto others =
      std::tuple(empty_gradients(target, wanted_pairs, pairs, p), empty_gradients(target, wanted_terms, terms, p),
                 empty_block_bias(target, wanted.block_bias_gradient, p));
  return std::tuple_cat(run_backward(target, x, additions, p), others);
}

const Registration registration(kSystem, OnHost::kRefused,
                                {define<forward<DenseWithLengths>>("block_sparse_attention"),
                                 define<forward<PackedWithPadding>>("block_sparse_attention_varlen"),
                                 define<backward<DenseWithLengths>>("block_sparse_attention_backward"),
                                 define<backward<PackedWithPadding>>("block_sparse_attention_varlen_backward")});

}  // namespace

}  // namespace attnx::ops
