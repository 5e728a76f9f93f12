// From a call to a launch: which kernel, how many blocks, where its partial results lie.
#include "attention.h"

#include <nvtx3/nvToolsExt.h>

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "cuda/arguments.h"
#include "cuda/launch/launch.h"
#include "cuda/mainloop.h"
#include "cuda/sm80/tile_sizes.h"
#include "cuda/sm90/backward_arguments.h"
#include "cuda/sm90/backward_tile_sizes.h"
#include "cuda/sm90/forward_arguments.h"
#include "cuda/sm90/tensor_map.h"
#include "cuda/sm90/tile_sizes.h"

namespace attnx::cuda {

namespace {

struct Range {  // on the timeline of Nsight Systems
  explicit Range(const char* name) { nvtxRangePushA(name); }
  ~Range() { nvtxRangePop(); }
};

const char* range_name(Score score, bool forward) {
  if (score == Score::kSigmoid) return forward ? "attnx::sigmoid_attention" : "attnx::sigmoid_attention_backward";
  return forward ? "attnx::softmax_attention" : "attnx::softmax_attention_backward";
}

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

template <std::size_t kCount>
int padded_head_dim(const AttentionParams& p, const int (&head_dims)[kCount]) {
  const auto wanted = std::max(p.head_dim, p.value_dim);
  return *std::find_if(std::begin(head_dims), std::end(head_dims), [&](int d) { return d >= wanted; });
}

// Whether every row starts on 16 bytes and fills whole ones, as copies of 16 bytes need.
bool is_aligned(const AttentionParams& p, const Tensor& x, std::int64_t heads, std::int64_t features) {
  const auto whole = [](std::int64_t elements) { return elements % 8 == 0; };
  return reinterpret_cast<std::uintptr_t>(x.data) % 16 == 0 && whole(features) && whole(x.row_stride) &&
         (p.batch == 1 || whole(x.batch_stride)) && (heads == 1 || whole(x.head_stride));
}
bool are_aligned(const AttentionParams& p, std::initializer_list<Tensor> of_query, std::initializer_list<Tensor> of_key,
                 std::initializer_list<Tensor> of_value) {
  const auto all = [&](std::initializer_list<Tensor> tensors, std::int64_t heads, std::int64_t features) {
    return std::all_of(tensors.begin(), tensors.end(),
                       [&](const Tensor& x) { return is_aligned(p, x, heads, features); });
  };
  return all(of_query, p.heads_q, p.head_dim) && all(of_key, p.heads_k, p.head_dim) &&
         all(of_value, p.heads_k, p.value_dim);
}

// Query heads whose rows share a tile: all that share a key head, but with lists, which each query head has of its own.
std::int64_t heads_in_tile(const AttentionParams& p) { return p.key_blocks.counts ? 1 : p.heads_q / p.heads_k; }

template <class Params>
Arguments<Params> common_arguments(const Params& p, int rows_of_tile, std::int64_t group) {
  Arguments<Params> args{};
  args.call = p;
  const bool listed = p.key_blocks.counts;
  // With lists up to the end of the last block, whose tiles the backward visits all.
  const std::int64_t rows = listed ? ceil_div(p.length_q, p.block_q) * p.block_q : group * p.length_q;
  const auto check_length = [](const char* name, std::int64_t length) {
    if (length >= kUnbounded)
      throw std::runtime_error(std::string(name) + ": expected fewer than 2^30 rows (of all heads that share a key " +
                               "head), got " + std::to_string(length));
  };
  check_length("query", rows);
  check_length("key", p.length_k);
  args.group = Divisor(std::uint32_t(group));
  args.heads = Divisor(std::uint32_t(p.heads_q / group));
  args.query_blocks = Divisor(std::uint32_t(std::max<std::int64_t>(ceil_div(rows, rows_of_tile), 1)));
  const auto bound = [](std::int64_t side) {
    return int(side < 0 ? kUnbounded : std::min<std::int64_t>(side, kUnbounded));
  };
  args.left = bound(p.window_left);
  args.right = bound(p.window_right);
  args.scale = float(p.scale);
  args.scale_log2 = float(p.scale * 1.4426950408889634);
  return args;
}

// Calls action.template operator()<Score, DType, head_dim>() for the call's own, the head dimension of this table.
template <const auto& kTable, class Action>
void with_instance(const AttentionParams& p, const Action& action) {
  const auto with_head_dim = [&]<Score kScore, DType kDType>() {
    const int head_dim = padded_head_dim(p, kTable);
    [&]<std::size_t... kAt>(std::index_sequence<kAt...>) {
      (void)((head_dim == kTable[kAt] && (action.template operator()<kScore, kDType, kTable[kAt]>(), true)) || ...);
    }(std::make_index_sequence<std::size(kTable)>());
  };
  const auto with_dtype = [&]<Score kScore>() {
    if (p.dtype == DType::kBFloat16) return with_head_dim.template operator()<kScore, DType::kBFloat16>();
    return with_head_dim.template operator()<kScore, DType::kFloat16>();
  };
  if (p.score == Score::kSigmoid) return with_dtype.template operator()<Score::kSigmoid>();
  return with_dtype.template operator()<Score::kSoftmax>();
}

// The numbers of a tile of the table, at run time.
struct TileSizes {
  int rows, keys, blocks_per_sm, shared_bytes;
};

template <class Tile>
TileSizes sizes_of(Tile) {
  return {Tile::kM, Tile::kN, Tile::kBlocksPerSm, Tile::kSharedBytes};
}

struct ForwardPlan {
  Mainloop mainloop;
  std::string why_not_sm90;  // on a device for it
  int head_dim;
  TileSizes tile;
  Variant variant;
  ForwardArguments args;
  std::int64_t tiles;          // of rows, without splits
  std::int64_t partial_bytes;  // one row's output and logsumexp of every split
  std::size_t workspace;
};

// As many shares of the keys as fill the device, where the tiles of rows alone do not: the fewest with at least 85 % of
// the best efficiency of the waves (FlashDecoding).
int choose_splits(std::int64_t tiles, std::int64_t key_tiles, int slots) {
  if (tiles * 5 >= std::int64_t(slots) * 4 || key_tiles <= 4) return 1;
  const auto efficiency = [&](std::int64_t splits) {
    const double waves = double(tiles * splits) / slots;
    return waves / std::max(1.0, double(ceil_div(tiles * splits, slots)));
  };
  const std::int64_t most = std::min<std::int64_t>(std::min<std::int64_t>(128, slots), key_tiles);
  double best = 0;
  for (std::int64_t splits = 1; splits <= most; ++splits) best = std::max(best, efficiency(splits));
  std::int64_t splits = 1;
  while (efficiency(splits) < 0.85 * best) ++splits;
  return int(splits);
}

// The tensors of a forward as TMA sees them.
struct TmaTensors {
  TmaTensor query, key, value, output;
};

TmaTensors tma_tensors(const ForwardParams& p, std::int64_t group) {
  const auto see = [&](const Tensor& x, std::int64_t features, std::int64_t group, std::int64_t rows,
                       std::int64_t packed_rows, std::int64_t heads) {
    return TmaTensor{
        p.dtype, x, features, group, p.cu_seqlens_q ? packed_rows : rows, heads, p.cu_seqlens_q ? 1 : p.batch};
  };
  return {see(p.query, p.head_dim, group, p.length_q, p.packed_rows_q, p.heads_q),
          see(p.key, p.head_dim, 1, p.length_k, p.packed_rows_k, p.heads_k),
          see(p.value, p.value_dim, 1, p.length_k, p.packed_rows_k, p.heads_k),
          see(p.output, p.value_dim, group, p.length_q, p.packed_rows_q, p.heads_q)};
}

// Sets what depends on the mainloop, but for the splits.
void plan_sm80(const ForwardParams& p, const Device& device, ForwardPlan& plan) {
  plan.mainloop = Mainloop::kSm80;
  plan.head_dim = padded_head_dim(p, kHeadDims);
  const std::int64_t rows = p.heads_q / p.heads_k * p.length_q;
  with_instance<kHeadDims>(p, [&]<Score, DType, int kHeadDim>() {
    const auto wide = sizes_of(typename ForwardTiles<kHeadDim>::Wide());
    const auto narrow = sizes_of(typename ForwardTiles<kHeadDim>::Narrow());
    plan.variant.wide =
        !plan.variant.listed && plan.variant.aligned && wide.shared_bytes <= device.shared_bytes && rows > narrow.rows;
    plan.tile = plan.variant.wide ? wide : narrow;
  });
  plan.args = common_arguments(p, plan.tile.rows, heads_in_tile(p));
}

void plan_sm90(const ForwardParams& p, ForwardPlan& plan) {
  plan.mainloop = Mainloop::kSm90;
  plan.head_dim = padded_head_dim(p, kTmaHeadDims);
  with_instance<kTmaHeadDims>(p, [&]<Score, DType, int kHeadDim>() {
    using Tiles = TmaForwardTiles<kHeadDim>;
    plan.tile = plan.variant.listed ? sizes_of(typename Tiles::Listed()) : sizes_of(typename Tiles::Dense());
  });
  // Boxes hold whole groups.
  const std::int64_t group = heads_in_tile(p);
  plan.args = common_arguments(p, plan.tile.rows, plan.tile.rows % group == 0 ? group : 1);
  plan.why_not_sm90 = [&]() -> std::string {
    if (!ATTNX_CUDA_SM90) return "attnx was built without it";
    const std::int64_t rows = p.length_q * plan.args.group.divisor();
    if (!plan.variant.listed && rows <= 64)
      return "at most 64 rows of query share their keys, got " + std::to_string(rows);
    const TmaTensors tensors = tma_tensors(p, plan.args.group.divisor());
    for (const auto& [name, x] :
         {std::pair("query", tensors.query), std::pair("key", tensors.key), std::pair("value", tensors.value)})
      if (!fits_tma(x))
        return std::string(name) + " does not start, or has strides that are not positive, on multiples of 16 bytes";
    if (!is_aligned(p, p.output, p.heads_q, p.value_dim)) return "the rows of output are not multiples of 16 bytes";
    return {};
  }();
}

ForwardPlan plan(const ForwardParams& p, std::optional<Mainloop> asked) {
  const Device& device = current_device();
  ForwardPlan plan{};
  plan.variant.listed = p.key_blocks.counts;
  plan.variant.aligned =
      are_aligned(p, {p.query}, {p.key}, {p.value}) && is_aligned(p, p.output, p.heads_q, p.value_dim);
  if (asked == Mainloop::kSm90 || (device.major == 9 && asked != Mainloop::kSm80)) {
    plan_sm90(p, plan);
    if (device.major != 9) plan.why_not_sm90 = "it runs on compute capability 9.0 alone";
    if (asked && !plan.why_not_sm90.empty())
      throw std::runtime_error("cuda_mainloop: expected a call that sm90 serves, got one that it does not: " +
                               plan.why_not_sm90);
  }
  if (plan.mainloop != Mainloop::kSm90 || !plan.why_not_sm90.empty()) plan_sm80(p, device, plan);
  plan.tiles = p.batch * plan.args.heads.divisor() * plan.args.query_blocks.divisor();

  int splits = 1;
  if (!plan.variant.listed) {
    const std::int64_t rows = p.length_q * plan.args.group.divisor();
    const std::int64_t seen = std::min<std::int64_t>(
        p.length_k, std::int64_t(plan.args.left) + plan.args.right + std::min<std::int64_t>(rows, plan.tile.rows));
    splits = choose_splits(plan.tiles, ceil_div(seen, plan.tile.keys), device.sm_count * plan.tile.blocks_per_sm);
  }
  plan.args.splits = Divisor(std::uint32_t(splits));
  if (splits > 1) {
    const std::int64_t partial_rows = splits * plan.tiles * plan.tile.rows;
    plan.partial_bytes = partial_rows * plan.head_dim * std::int64_t(sizeof(float));
    plan.workspace =
        std::size_t(plan.partial_bytes) + (p.score == Score::kSoftmax ? std::size_t(partial_rows) * sizeof(float) : 0);
  }
  if (plan.mainloop == Mainloop::kSm90) plan.workspace += sizeof(int);  // the counter, at the end
  return plan;
}

// As many of the heads, a divisor of their number, as leave their keys and values in most of an L2 of 50 MB.
std::int64_t heads_in_section(const ForwardParams& p, std::int64_t heads, std::int64_t heads_on_key_head) {
  constexpr std::int64_t kBytes = 32 << 20;
  const std::int64_t bytes = std::max<std::int64_t>(p.length_k * (p.head_dim + p.value_dim) * 2, 1);
  std::int64_t most = std::clamp<std::int64_t>(kBytes / bytes * heads_on_key_head, 1, heads);
  while (heads % most) --most;
  return most;
}

void launch_sm90(const ForwardParams& p, const ForwardPlan& plan, const Launch& launch) {
  const Device& device = current_device();
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  const std::int64_t group = plan.args.group.divisor(), tiles = plan.tiles * plan.args.splits.divisor();
  if (tiles > INT32_MAX)
    throw std::runtime_error("query: expected at most 2^31 - 1 tiles of rows, got " + std::to_string(tiles));
  const TmaTensors tensors = tma_tensors(p, group);
  constexpr int kWarpRows = 16;
  TmaForwardArguments args{};
  args.query = make_tensor_map(tensors.query, plan.tile.rows);
  args.key = make_tensor_map(tensors.key, plan.tile.keys);
  args.value = make_tensor_map(tensors.value, plan.tile.keys);
  args.stores_boxes = !p.cu_seqlens_q && kWarpRows % group == 0 && fits_tma(tensors.output);
  if (args.stores_boxes) args.output = make_tensor_map(tensors.output, kWarpRows);
  args.args = plan.args;
  args.row_tiles = int(tiles);
  const std::int64_t heads = p.batch * plan.args.heads.divisor();
  args.section = Divisor(std::uint32_t(heads_in_section(p, heads, p.heads_q / group / p.heads_k)));
  args.taken = reinterpret_cast<int*>(static_cast<char*>(launch.workspace) + plan.workspace - sizeof(int));
  check(cudaMemsetAsync(args.taken, 0, sizeof(int), stream), "cudaMemsetAsync");
  const std::int64_t blocks = std::min<std::int64_t>(tiles, std::int64_t(device.sm_count) * plan.tile.blocks_per_sm);
  if constexpr (ATTNX_CUDA_SM90)
    with_instance<kTmaHeadDims>(p, [&]<Score kScore, DType kDType, int kHeadDim>() {
      launch_forward_sm90<kScore, kDType, kHeadDim>(args, plan.variant, blocks, stream);
    });
}

// Consecutive arrays in the workspace, each on 256 bytes.
class Layout {
  std::size_t bytes_ = 0;

 public:
  std::size_t bytes() const { return bytes_; }
  // Where n elements lie; in a workspace at null the addresses are the offsets.
  template <class T>
  T* place(void* workspace, std::int64_t n) {
    T* const at = reinterpret_cast<T*>(static_cast<char*>(workspace) + bytes_);
    bytes_ += (std::size_t(n) * sizeof(T) + 255) / 256 * 256;
    return at;
  }
};

struct BackwardPlan {
  Mainloop mainloop;
  std::string why_not_sm90;  // on a device for it
  int head_dim, rows_of_tile, keys_of_tile;
  int score_warps;  // that have sums of a row each, for the gradients of bias and slopes
  Variant variant;
  BackwardArguments args;
  std::size_t workspace;
  void* sums;  // that start at zero
  std::size_t sums_bytes;
};

// The tensors of a backward as TMA sees them.
struct TmaGradTensors {
  TmaTensor query, key, value, grad_output;
};

TmaGradTensors tma_tensors(const BackwardParams& p, std::int64_t group) {
  const auto of_query = [&](const Tensor& x, std::int64_t features) {
    return p.cu_seqlens_q ? TmaTensor{p.dtype, x, features, group, p.packed_rows_q, p.heads_q, 1}
                          : TmaTensor{p.dtype, x, features, group, p.length_q, p.heads_q, p.batch};
  };
  const auto of_key = [&](const Tensor& x, std::int64_t features) {
    return p.cu_seqlens_k ? TmaTensor{p.dtype, x, features, 1, p.packed_rows_k, p.heads_k, 1}
                          : TmaTensor{p.dtype, x, features, 1, p.length_k, p.heads_k, p.batch};
  };
  return {of_query(p.query, p.head_dim), of_key(p.key, p.head_dim), of_key(p.value, p.value_dim),
          of_query(p.grad_output, p.value_dim)};
}

void plan_sm80(const BackwardParams& p, const Device& device, BackwardPlan& plan) {
  plan.mainloop = Mainloop::kSm80;
  plan.head_dim = padded_head_dim(p, kHeadDims);
  with_instance<kHeadDims>(p, [&]<Score, DType, int kHeadDim>() {
    using Tiles = BackwardTiles<kHeadDim>;
    plan.variant.wide =
        !plan.variant.listed && plan.variant.aligned && Tiles::Wide::kSharedBytes <= device.shared_bytes;
    const auto take = [&]<class Tile>(Tile) {
      plan.rows_of_tile = Tile::kM;
      plan.keys_of_tile = Tile::kN;
      plan.score_warps = Tile::kScoreWarpsN;
    };
    plan.variant.wide ? take(typename Tiles::Wide()) : take(typename Tiles::Narrow());
  });
  plan.args = common_arguments(p, plan.rows_of_tile, heads_in_tile(p));
}

void plan_sm90(const BackwardParams& p, BackwardPlan& plan) {
  plan.mainloop = Mainloop::kSm90;
  plan.head_dim = padded_head_dim(p, kTmaBackwardHeadDims);
  with_instance<kTmaBackwardHeadDims>(p, [&]<Score, DType, int kHeadDim>() {
    using Tiles = TmaBackwardTiles<kHeadDim>;
    const auto take = [&]<class Tile>(Tile) {
      plan.rows_of_tile = Tile::kM;
      plan.keys_of_tile = Tile::kN;
      plan.score_warps = Tile::kN / 16;
    };
    plan.variant.listed ? take(typename Tiles::Listed()) : take(typename Tiles::Dense());
  });
  // Boxes hold whole groups.
  const std::int64_t group = heads_in_tile(p);
  plan.args = common_arguments(p, plan.rows_of_tile, plan.rows_of_tile % group == 0 ? group : 1);
  plan.why_not_sm90 = [&]() -> std::string {
    if (!ATTNX_CUDA_SM90) return "attnx was built without it";
    const TmaGradTensors tensors = tma_tensors(p, plan.args.group.divisor());
    for (const auto& [name, x] : {std::pair("query", tensors.query), std::pair("key", tensors.key),
                                  std::pair("value", tensors.value), std::pair("grad_output", tensors.grad_output)})
      if (!fits_tma(x))
        return std::string(name) + " does not start, or has strides that are not positive, on multiples of 16 bytes";
    if (!are_aligned(p, {p.grad_query}, {p.grad_key}, {p.grad_value}))
      return "the rows of the gradients are not multiples of 16 bytes";
    return {};
  }();
}

BackwardPlan plan(const BackwardParams& p, std::optional<Mainloop> asked, bool deterministic, void* workspace) {
  const Device& device = current_device();
  BackwardPlan plan{};
  plan.variant.listed = p.key_blocks.counts;
  plan.variant.aligned = are_aligned(p, {p.query, p.grad_query}, {p.key, p.grad_key}, {p.value, p.grad_value}) &&
                         is_aligned(p, p.grad_output, p.heads_q, p.value_dim);
  if (asked == Mainloop::kSm90 || (device.major == 9 && asked != Mainloop::kSm80)) {
    plan_sm90(p, plan);
    if (device.major != 9) plan.why_not_sm90 = "it runs on compute capability 9.0 alone";
    if (asked && !plan.why_not_sm90.empty())
      throw std::runtime_error("cuda_mainloop: expected a backward that sm90 serves, got one that it does not: " +
                               plan.why_not_sm90);
  }
  if (plan.mainloop != Mainloop::kSm90 || !plan.why_not_sm90.empty()) plan_sm80(p, device, plan);

  auto& args = plan.args;
  args.key_heads = Divisor(std::uint32_t(p.heads_k));
  args.row_heads = int(args.heads.divisor() / p.heads_k);
  args.key_blocks = Divisor(std::uint32_t(std::max<std::int64_t>(ceil_div(p.length_k, plan.keys_of_tile), 1)));
  args.row_tiles = p.cu_seqlens_q ? p.packed_rows_q * args.group.divisor() / plan.rows_of_tile + p.batch
                                  : p.batch * args.query_blocks.divisor();

  const std::int64_t tiles = args.heads.divisor() * args.row_tiles, rows = tiles * plan.rows_of_tile;
  Layout layout;
  args.offset = layout.place<float>(workspace, rows);
  if (p.score == Score::kSoftmax) args.delta = layout.place<float>(workspace, rows);
  args.deterministic = deterministic;
  if (deterministic && plan.variant.listed) {
    const BlockList& lists = p.query_blocks;
    const std::int64_t last = (p.batch - 1) * lists.indices_batch_stride + (p.heads_q - 1) * lists.indices_head_stride +
                              (ceil_div(p.length_k, p.block_k) - 1) * lists.indices_row_stride;
    args.list_order = layout.place<int>(workspace, std::max<std::int64_t>(last + lists.width, 0));
  }
  const std::size_t zeros_begin = layout.bytes();
  plan.sums = args.grad_query_sum = layout.place<float>(workspace, rows * plan.head_dim);
  if (p.grad_bias) args.bias_sum = layout.place<float>(workspace, rows * plan.score_warps);
  if (p.grad_alibi_slopes) args.slope_sum = layout.place<float>(workspace, rows * plan.score_warps);
  args.turns = layout.place<int>(workspace, tiles);
  plan.workspace = layout.bytes();
  plan.sums_bytes = layout.bytes() - zeros_begin;
  return plan;
}

void launch_sm90(const BackwardParams& p, const BackwardPlan& plan, std::int64_t blocks, cudaStream_t stream) {
  const TmaGradTensors tensors = tma_tensors(p, plan.args.group.divisor());
  TmaBackwardArguments args{};
  args.query = make_tensor_map(tensors.query, plan.rows_of_tile);
  args.key = make_tensor_map(tensors.key, plan.keys_of_tile);
  args.value = make_tensor_map(tensors.value, plan.keys_of_tile);
  args.grad_output = make_tensor_map(tensors.grad_output, plan.rows_of_tile);
  args.args = plan.args;
  if constexpr (ATTNX_CUDA_SM90)
    with_instance<kTmaBackwardHeadDims>(p, [&]<Score kScore, DType kDType, int kHeadDim>() {
      launch_backward_sm90<kScore, kDType, kHeadDim>(args, plan.variant, blocks, stream);
    });
}

}  // namespace

std::size_t forward_workspace(const ForwardParams& params, const Launch& launch) {
  return plan(params, launch.mainloop).workspace;
}

void forward(const ForwardParams& params, const Launch& launch) {
  const Range range(range_name(params.score, true));
  ForwardPlan plan = cuda::plan(params, launch.mainloop);
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  const int splits = plan.args.splits.divisor();
  if (splits > 1) {
    plan.args.partial_output = static_cast<float*>(launch.workspace);
    plan.args.partial_logsumexp = reinterpret_cast<float*>(static_cast<char*>(launch.workspace) + plan.partial_bytes);
  }
  if (plan.mainloop == Mainloop::kSm90) {
    launch_sm90(params, plan, launch);
  } else {
    with_instance<kHeadDims>(params, [&]<Score kScore, DType kDType, int kHeadDim>() {
      launch_forward<kScore, kDType, kHeadDim>(plan.args, plan.variant, plan.tiles * splits, stream);
    });
  }
  if (splits > 1) launch_combine(plan.args, plan.args.query_blocks.divisor() * plan.tile.rows, plan.head_dim, stream);
}

std::size_t backward_workspace(const BackwardParams& params, const Launch& launch) {
  return plan(params, launch.mainloop, launch.deterministic, nullptr).workspace;
}

void backward(const BackwardParams& params, const Launch& launch) {
  const Range range(range_name(params.score, false));
  const BackwardPlan plan = cuda::plan(params, launch.mainloop, launch.deterministic, launch.workspace);
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  check(cudaMemsetAsync(plan.sums, 0, plan.sums_bytes, stream), "cudaMemsetAsync");
  const bool aligned = plan.variant.aligned && is_aligned(params, params.output, params.heads_q, params.value_dim);
  launch_row_terms(plan.args, plan.rows_of_tile, aligned, stream);
  if (plan.args.list_order) launch_list_order(plan.args, stream);
  const std::int64_t blocks = params.batch * params.heads_k * plan.args.key_blocks.divisor();
  if (plan.mainloop == Mainloop::kSm90) {
    launch_sm90(params, plan, blocks, stream);
  } else {
    with_instance<kHeadDims>(params, [&]<Score kScore, DType kDType, int kHeadDim>() {
      launch_backward<kScore, kDType, kHeadDim>(plan.args, plan.variant, blocks, stream);
    });
  }
  launch_parameter_sums(plan.args, plan.rows_of_tile, plan.score_warps, stream);
}

std::string forward_kernel(const ForwardParams& params) {
  const ForwardPlan plan = cuda::plan(params, asked_mainloop());
  const bool sm90 = plan.mainloop == Mainloop::kSm90;
  return (sm90 ? "attnx_forward_sm90, " : "attnx_forward_sm80, ") + std::to_string(plan.tile.rows) + " rows x " +
         std::to_string(plan.tile.keys) + " keys, head_dim padded to " + std::to_string(plan.head_dim) +
         (plan.variant.aligned ? "" : ", rows not on 16 bytes") +
         (plan.args.splits.divisor() > 1 ? ", keys in " + std::to_string(plan.args.splits.divisor()) + " shares" : "") +
         (plan.why_not_sm90.empty() ? "" : "; not sm90: " + plan.why_not_sm90);
}

std::string backward_kernel(const BackwardParams& params) {
  const BackwardPlan plan = cuda::plan(params, asked_mainloop(), false, nullptr);
  const bool sm90 = plan.mainloop == Mainloop::kSm90;
  return (sm90 ? "attnx_backward_sm90, " : "attnx_backward_sm80, ") + std::to_string(plan.rows_of_tile) + " rows x " +
         std::to_string(plan.keys_of_tile) + " keys, head_dim padded to " + std::to_string(plan.head_dim) +
         (plan.variant.aligned ? "" : ", rows not on 16 bytes") +
         (plan.why_not_sm90.empty() ? "" : "; not sm90: " + plan.why_not_sm90);
}

}  // namespace attnx::cuda
