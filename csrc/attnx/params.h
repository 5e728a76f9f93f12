// Every attention kernel is told these: plain pointers, sizes and strides, the same for the CPU and the GPU.
#pragma once

#include <cstdint>

#include "attnx/score.h"
#include "attnx/staircase.h"

namespace attnx {

inline constexpr std::int64_t kMaxHeadDim = 256;

enum class DType : std::uint8_t { kFloat32, kBFloat16, kFloat16, kFloat64 };

// The rule is what the sigmoid adds to the logits of a row besides the constant and the tensor.
enum class BiasRule : std::uint8_t {
  kNone,
  kLength,  // -log(length_k of the sequence)
  kRow,     // -log(number of keys that the row sees)
};

// This is a (batch, head, row, feature) tensor whose features are contiguous. Strides count elements. Packed sequences,
// (row, head, feature), have no batch stride: their rows are found by cu_seqlens.
struct Tensor {
  void* data = nullptr;
  std::int64_t batch_stride = 0, head_stride = 0, row_stride = 0;
};

// This is one number per head: [heads], or a scalar with stride 0. It is null where absent.
struct PerHead {
  const void* data = nullptr;
  std::int64_t stride = 0;
};

// The list says which blocks of keys each block of queries visits, in the format of
// torch.nn.attention.flex_attention.BlockMask; or, transposed, which blocks of queries visit each block of keys.
// Strides count elements, and are 0 where one list serves all.
struct BlockList {
  const std::int32_t* counts = nullptr;   // [batch, heads_q, blocks]
  const std::int32_t* indices = nullptr;  // [batch, heads_q, blocks, width], the first `count` of each row in use
  // These two are shaped like indices, with the strides of bias, and may be null.
  const float* bias = nullptr;     // added to the logits of the block
  const float* divisor = nullptr;  // of the block's weights; sigmoid only
  std::int64_t counts_batch_stride = 0, counts_head_stride = 0;
  std::int64_t indices_batch_stride = 0, indices_head_stride = 0, indices_row_stride = 0;
  std::int64_t width = 0;  // no count is above it
  std::int64_t bias_batch_stride = 0, bias_head_stride = 0, bias_row_stride = 0;
};

// Each query head has clusters of rows: cluster c of a head holds the rows indices[offsets[c]] up to
// indices[offsets[c + 1] - 1], ascending.
struct Clusters {
  const std::int32_t* indices = nullptr;  // [batch, heads_q, slots]
  const std::int32_t* offsets = nullptr;  // [batch, heads_q, clusters + 1]
  std::int64_t slots = 0;
  std::int64_t rows = 0;  // of a head, in clusters or not
};

// With gathered rows a query attends, in each cluster of queries that holds it, to the keys of the cluster of the same
// number; its output is the mean over these clusters, 0 without any.
struct Gather {
  std::int64_t clusters = 0;  // of a head
  Clusters queries, keys;
  // These are learned keys and values, [heads_k, memory, dim], which every cluster sees before its own.
  std::int64_t memory = 0;
  Tensor memory_key, memory_value;
  // A head's clusters are those of its sequences, as many of each, one sequence after another. Under a causal mask
  // query i of a sequence sees the keys up to row i + its lead. Null: one sequence, whose last query sees the last key.
  std::int64_t sequences = 1;
  const std::int32_t* leads = nullptr;  // [batch, sequences]

  // These say what one run of the loop is about, of batch * heads_q heads; the kernel fills them in.
  std::int64_t first_head = 0, heads = 0;
  const std::int32_t* query_starts = nullptr;  // [heads, queries.rows + 1]: differences count a query's clusters
};

// The type of the numbers of a mask: none; bool, true where the key takes part; the call's dtype or the accumulator's,
// added to the logit.
enum class MaskKind : std::uint8_t { kNone, kBool, kInput, kSum };

// This is a number for each pair of a query and a key, [batch, heads_q, length_q, length_k]. Strides count elements,
// and are 0 where one number serves all.
struct PairMask {
  MaskKind kind = MaskKind::kNone;
  const void* data = nullptr;
  std::int64_t batch_stride = 0, head_stride = 0, row_stride = 0, key_stride = 0;

  // Numbers by distance, [batch, heads_q, length_q + length_k - 1], are a mask whose rows overlap: pair (i, j) has
  // number i - j + length_k - 1, and data is that of pair (0, 0).
  bool by_distance() const { return key_stride == -1; }
};

// This is a number for each key, [batch, heads_q, length_k], whose keys are contiguous, in the accumulator's type. It
// is null where absent. Strides are 0 where one number serves all. Packed keys, [heads_q, key], have no batch stride.
struct PerKey {
  void* data = nullptr;
  std::int64_t batch_stride = 0, head_stride = 0;
};

// These are the keys [start, end) that each row sees at most, [batch, heads_q, length_q] pairs of numbers that lie
// together, counted from the first key of the sequence. A pair may reach beyond the keys, and an empty one hides all of
// them. Strides count elements, and are 0 where one number serves all. It is null where absent.
struct RowBounds {
  const std::int32_t* data = nullptr;
  std::int64_t batch_stride = 0, head_stride = 0, row_stride = 0;
};

// These are rows of numbers of which a pair takes one by its distance: query i and key j take number
// index[i - j + length_k - 1] of the query's row and of the key's row. Rows are contiguous, in the accumulator's type.
// A table is null where absent.
struct DistanceTables {
  const std::int32_t* index = nullptr;  // [length_q + length_k - 1]; null without tables
  std::int64_t numbers = 0;             // of a row
  Tensor query;                         // [batch, heads_q, length_q, numbers]
  Tensor key;                           // [batch, heads_q, length_k, numbers]
};

// A logit is softcap * tanh(x / softcap) of x = scale * query . key, plus the row's and the tile's bias, less the slope
// times the distance, plus key_bias, attn_mask and the numbers of the tables. exp(logit), or its sigmoid, is multiplied
// by key_mask. A weight that is kept counts 1 / (1 - dropout) times, after the row's sum is taken; attnx/dropout.h says
// which ones are.
struct LogitTerms {
  double softcap = 0;  // 0: none
  PairMask attn_mask;
  DistanceTables tables;  // there is no attn_mask beside them
  PerKey key_bias;
  PerKey key_mask;  // in [0, 1]
  double dropout = 0;
  // These are numbers in the memory of the tensors, so that a captured graph draws others when they change. offset is
  // from 0 to 2^32 - 1.
  const std::int64_t *seed = nullptr, *offset = nullptr;

  bool any() const {
    return softcap != 0 || attn_mask.kind != MaskKind::kNone || tables.index || key_bias.data || key_mask.data ||
           dropout != 0;
  }
};

// The weight of a logit t is max(gain * softplus(t) - shift, 0) to this power, over the sum of these. Gain and shift
// are numbers of the row, like a logsumexp, and make the largest base of a row 1.
struct Sharpening {
  std::int64_t power = 0;
  Tensor gain, shift;
};

struct AttentionParams {
  DType dtype = DType::kFloat32;
  Score score = Score::kSigmoid;

  std::int64_t batch = 0;    // sequences
  std::int64_t heads_q = 0;  // a multiple of heads_k; consecutive query heads share a key head
  std::int64_t heads_k = 0;
  std::int64_t length_q = 0;  // the longest, with cu_seqlens
  std::int64_t length_k = 0;
  std::int64_t head_dim = 0;
  std::int64_t value_dim = 0;

  Tensor query;  // [batch, heads_q, length_q, head_dim]
  Tensor key;    // [batch, heads_k, length_k, head_dim]
  Tensor value;  // [batch, heads_k, length_k, value_dim]

  // Queries of sequence b are the rows [cu_seqlens_q[b], cu_seqlens_q[b + 1]) of packed tensors. Where it is null,
  // tensors are not packed and every sequence has all queries.
  const std::int32_t* cu_seqlens_q = nullptr;
  // Keys of sequence b are the rows [key_starts[b], key_ends[b]): of packed tensors, where key_ends is key_starts + 1,
  // or of the sequence's own rows. Where these are null, every sequence has all keys.
  const std::int32_t* key_starts = nullptr;
  const std::int32_t* key_ends = nullptr;
  std::int64_t packed_rows_q = 0, packed_rows_k = 0;  // of all sequences, with cu_seqlens_q
  bool has_padding = false;                           // whether packed tensors may have rows of no sequence at the end

  double scale = 1;
  // Query i stands at the key i + length_k - length_q + position_offset, and sees key j where -left <= j - that <=
  // right; negative means no bound.
  std::int64_t window_left = -1, window_right = -1;
  std::int64_t position_offset = 0;
  RowBounds row_bounds;  // of the same rows; BiasRule::kRow does not count with them

  // These are additions to the logits, in the accumulator's type (float, or double for kFloat64).
  BiasRule bias_rule = BiasRule::kNone;
  double bias_value = 0;
  PerHead bias;          // added
  PerHead alibi_slopes;  // times the distance of key j from where query i stands, subtracted

  LogitTerms terms;

  // The sink is one more logit of every row, in the accumulator's type, which takes weight and has no value. Only
  // softmax_sink has it.
  PerHead sink;

  Sharpening sharpening;  // only sharpened_softplus has it

  // With lists only the listed blocks take part, under the same window. With cu_seqlens each sequence has lists.
  std::int64_t block_q = 0, block_k = 0;  // rows and keys of a block
  BlockList key_blocks;                   // of each block of queries; null counts: every block takes part

  // This says which rows are gathered, or is null. length_q and length_k are then those of the longest clusters, memory
  // included.
  const Gather* gather = nullptr;

  // This is a quantised cache in the place of key and value, or null; only the forward takes it. length_k is its
  // longest sequence.
  const Staircase* cache = nullptr;
  const std::int64_t* query_lengths = nullptr;  // [batch], queries of each sequence; null: length_q of all
};

struct ForwardParams : AttentionParams {
  Tensor output;  // [batch, heads_q, length_q, value_dim]
  // It is [batch, heads_q, length_q] in the accumulator's type, or [batch, heads_q, slots] where rows are gathered. Its
  // row_stride is 1, and only normalised scores have it.
  Tensor logsumexp;
};

struct BackwardParams : AttentionParams {
  BlockList query_blocks;  // key_blocks transposed: of each block of keys

  Tensor grad_output;     // [batch, heads_q, length_q, value_dim]
  Tensor output;          // as from the forward; of normalised scores; null where a query may be in several clusters
  Tensor logsumexp;       // as from the forward; of normalised scores
  Tensor grad_logsumexp;  // like logsumexp; of normalised scores

  Tensor grad_query;  // like query
  Tensor grad_key;    // like key
  Tensor grad_value;  // like value
  // These are gradients by another way to the same inputs, in the accumulator's type. They are added before the sum is
  // rounded; null: none. On CUDA only calls with lists have them.
  Tensor grad_query_addend, grad_key_addend, grad_value_addend;
  // These are [batch, heads_q] in double, the sums over each sequence; they are null where they are not wanted.
  double* grad_bias = nullptr;
  double* grad_alibi_slopes = nullptr;
  double* grad_sink = nullptr;
  // This is [batch, heads_q, blocks of queries, key_blocks.width] in double, zeroed: of the bias of each listed block.
  // It is null where it is not wanted.
  double* grad_block_bias = nullptr;
  // These are like terms.key_bias and key_mask, and like terms.attn_mask in the accumulator's type, with strides of
  // their own, which are 0 where one number serves all: a sum over these. They are null where they are not wanted.
  // grad_attn_mask comes zeroed, so that pairs that no tile visits need no write; of the others every number is
  // written.
  PerKey grad_key_bias, grad_key_mask;
  PairMask grad_attn_mask;
  // These are like terms.tables, and come zeroed. They are null where they are not wanted.
  Tensor grad_query_table, grad_key_table;
  Tensor grad_memory_key, grad_memory_value;  // like gather.memory_key and memory_value

  // A run of the loop leaves here what each cluster adds to the gradients of its keys: rows of sums, as long as vectors
  // fill. The kernel fills these in.
  void *key_sums = nullptr, *value_sums = nullptr;
};

// to[h] becomes the sum over b of from[b][h]. These are the gradients of numbers per head.
struct SumOverBatchParams {
  DType dtype = DType::kFloat32;  // of the result: kFloat32 or kFloat64
  std::int64_t batch = 0, heads = 0;
  const double* from = nullptr;  // [batch, heads]
  void* to = nullptr;            // [heads]
};

// This is phi of linear attention, a function of the features of one query or key.
enum class FeatureMap : std::uint8_t { kSoftmax, kElu, kRelu };  // kElu: elu(x) + 1

// Linear attention runs over the blocks of keys whose label is in a scope: phi(q_i) . phi(k_j) weighs value j, over the
// sum of these weights. The score, the bias and the lists of AttentionParams have no part in it.
struct LinearParams : AttentionParams {
  FeatureMap feature_map = FeatureMap::kSoftmax;
  // The labels are [batch, heads_q, query blocks, key blocks] of -1, 0 and 1. Strides count elements, and are 0 where
  // one map serves all.
  const std::int8_t* labels = nullptr;
  std::int64_t labels_batch_stride = 0, labels_head_stride = 0, labels_row_stride = 0;
  std::int8_t scope_low = 0, scope_high = 0;  // labels in scope, both included
};

struct LinearForwardParams : LinearParams {
  Tensor output;  // [batch, heads_q, length_q, value_dim]; 0 where the weights of a row sum to 0
};

struct LinearBackwardParams : LinearParams {
  Tensor grad_output, output;               // [batch, heads_q, length_q, value_dim]
  Tensor grad_query, grad_key, grad_value;  // in the accumulator's type
};

// Each entry of a batch has so many sequences: sequence s is the rows [starts[s], ends[s]). Null: one, of all rows.
struct SequenceRows {
  std::int64_t count = 1;
  const std::int32_t *starts = nullptr, *ends = nullptr;  // [batch, count], rising
};

// Rows, normalised over their features as by LayerNorm without scale and bias, are compared with the centroids of each
// head. Those of no sequence are nothing's nearest, and no centroid's.
struct RouteParams {
  DType dtype = DType::kFloat32;
  std::int64_t batch = 0, heads = 0, length = 0, head_dim = 0;
  std::int64_t group = 1;  // consecutive heads share a head of rows
  Tensor rows;             // [batch, heads / group, length, head_dim]
  std::int64_t clusters = 0;
  const float* centroids = nullptr;  // [heads, clusters, head_dim]
  SequenceRows sequences;
};

// The kernel lists the cluster_size rows of each sequence with the largest products for each centroid, ascending. Of
// equals it takes those with lower indices, and it takes none whose product is NaN.
struct SelectParams : RouteParams {
  std::int64_t cluster_size = 0;
  std::int32_t* indices = nullptr;  // [batch, heads, sequences, clusters, cluster_size]
  std::int32_t* counts = nullptr;   // [batch, heads, sequences, clusters]: how many of them are in use
};

// The kernel finds the centroid with the largest product for each row, of equals that with the lower index. It writes
// -1 where all are NaN. The clusters of a sequence may count behind those of the sequences before it.
struct NearestParams : RouteParams {
  bool by_sequence = false;
  std::int32_t* nearest = nullptr;  // [batch, heads, length]
};

// The kernel sums the normalised rows of each centroid, and counts them.
struct CentroidSumsParams : RouteParams {
  const std::int32_t* nearest = nullptr;  // [batch, heads, length]
  double* sums = nullptr;                 // [heads, clusters, head_dim], added to
  double* counts = nullptr;               // [heads, clusters], added to
};

// The kernel puts new tokens at the end of each sequence of a cache. The state is replaced when everything else is
// written.
struct StaircaseAppendParams {
  DType dtype = DType::kFloat32;
  std::int64_t batch = 0;
  Staircase cache;
  Tensor key, value;  // [batch, heads, tokens, head_dim], the new tokens
  std::int64_t tokens = 0;
  const std::int64_t* counts = nullptr;  // [batch], how many of the tokens a sequence gets; null: all of them
  std::int64_t most_units = -1;          // for tests: how much is written before it stops; -1: all

  const std::int64_t* next_state = nullptr;  // [batch][state_size]; what runs the kernel fills this in
};

// The kernel drops the last tokens of each sequence. The state is replaced when everything else is written.
struct StaircaseCropParams {
  DType dtype = DType::kFloat32;
  std::int64_t batch = 0;
  Staircase cache;
  const std::int64_t* lengths = nullptr;  // [batch], how many tokens stay; negative: go

  const std::int64_t* next_state = nullptr;  // as of an append
};

struct StaircaseReadParams {
  DType dtype = DType::kFloat32;
  std::int64_t batch = 0, first = 0, count = 0;  // tokens of each sequence
  Staircase cache;
  Tensor key, value;  // [batch, heads, count, head_dim]; not written beyond a sequence
};

}  // namespace attnx
