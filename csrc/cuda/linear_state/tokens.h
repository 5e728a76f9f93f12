// This is what the kernels of linear attention with a state have in shared memory: rows of tokens, whose features are
// made where a product reads them, and columns of values and of states.
#pragma once

#include "cuda/common/shared_arena.h"
#include "cuda/linear_state/arguments.h"

namespace attnx::cuda {

// These are the columns of a tile: the first stands for the ones behind the values, whose sums are the denominators.
struct StateColumns {
  int first, count, lanes;  // values

  __device__ __forceinline__ StateColumns(const LinearStateArguments& a, int tile)
      : first(tile * a.width), count(min(a.width, int(a.p.value_dim) - first)), lanes(round_to(a.width + 1, 8)) {}
  // This is the place of a column in rows of states.
  __device__ __forceinline__ int place(const LinearStateArguments& a, int column) const {
    return column == 0 ? int(a.p.value_dim) : first + column - 1;
  }
};

struct StateUnit {
  int batch, head, tile, segment;  // head: of keys

  __device__ __forceinline__ StateUnit(const LinearStateArguments& a, int index)
      : batch(0), head(0), tile(index % a.tiles), segment(0) {
    index /= a.tiles;
    segment = index % a.segments;
    index /= a.segments;
    head = index % int(a.p.heads_k);
    batch = index / int(a.p.heads_k);
  }
  __device__ __forceinline__ float* state(const LinearStateArguments& a) const {
    return a.states + ((std::int64_t(batch) * a.p.heads_k + head) * a.segments + segment) * a.state_size;
  }
};

template <class Element>
__device__ __forceinline__ Element* row_of(const Tensor& x, int batch, int head, std::int64_t row) {
  return static_cast<Element*>(x.data) + batch * x.batch_stride + head * x.head_stride + row * x.row_stride;
}

// The features of a row are 1, x_a, and x_a x_b for a <= b, where those of a = b are divided by the square root of 2:
// all are products of two numbers of the row, behind which there are a 1 and a 0.
struct FeaturePair {
  std::uint16_t first, second;
};

// These are a chunk's rows phi(x), or, of the Taylor polynomial, x itself.
template <bool kTaylor>
struct StateRows {
  SharedMatrix x;
  const FeaturePair* pairs;
  int dim;

  static __host__ __device__ int columns(int dim) { return round_to(dim, 16) + (kTaylor ? 2 : 0); }
  __device__ __forceinline__ int one() const { return round_to(dim, 16); }

  __device__ __forceinline__ float feature(int token, int f) const {
    if constexpr (!kTaylor) return x(token, f);
    const FeaturePair pair = pairs[f];
    const float product = x(token, pair.first) * x(token, pair.second);
    return pair.first == pair.second && pair.first < dim ? product * 0.70710678f : product;
  }
};

// This lists the pairs, and behind them some whose product is 0.
__device__ __forceinline__ void list_pairs(FeaturePair* pairs, int dim, int feature_lanes) {
  const auto one = std::uint16_t(round_to(dim, 16)), zero = std::uint16_t(one + 1);
  const int features = int(taylor_features(dim));
  for (int a = threadIdx.x; a < dim; a += kStateThreads) {
    pairs[1 + a] = {std::uint16_t(a), one};
    const int begin = 1 + dim + a * dim - a * (a - 1) / 2;
    for (int b = a; b < dim; ++b) pairs[begin + b - a] = {std::uint16_t(a), std::uint16_t(b)};
  }
  if (threadIdx.x == 0) pairs[0] = {one, one};
  for (int f = features + threadIdx.x; f < feature_lanes; f += kStateThreads) pairs[f] = {zero, zero};
}

__device__ __forceinline__ float max_of_warp(float x) {
#pragma unroll
  for (int i = 16; i > 0; i /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, i));
  return x;
}
__device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll
  for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(~0u, x, i);
  return x;
}

// A warp maps a row of features in place.
__device__ __forceinline__ void map_row(FeatureMap map, float* x, int dim) {
  const int lane = threadIdx.x % 32;
  if (map == FeatureMap::kSoftmax) {
    float highest = -INFINITY, sum = 0;
    for (int d = lane; d < dim; d += 32) highest = fmaxf(highest, x[d]);
    highest = max_of_warp(highest);
    for (int d = lane; d < dim; d += 32) sum += x[d] = expf(x[d] - highest);
    const float factor = 1 / sum_of_warp(sum);
    for (int d = lane; d < dim; d += 32) x[d] *= factor;
  } else if (map == FeatureMap::kElu) {
    for (int d = lane; d < dim; d += 32) x[d] = x[d] > 0 ? x[d] + 1 : expf(x[d]);
  } else {
    for (int d = lane; d < dim; d += 32) x[d] = x[d] < 0 ? 0 : x[d];  // a NaN stays
  }
}

// This loads rows [first, first + count) of a head, of which a chunk has more: those become 0, and so do their
// features.
template <class Input, bool kTaylor>
__device__ __forceinline__ void load_rows(const LinearStateArguments& a, const StateRows<kTaylor>& to, const Tensor& x,
                                          int batch, int head, std::int64_t first, int count, float factor) {
  const int lane = threadIdx.x % 32, lanes = to.one();
#pragma unroll 2
  for (int i = threadIdx.x / 32; i < a.chunk; i += kStateWarps) {
    float* const row = to.x.row(i);
    const Input* const from = row_of<const Input>(x, batch, head, first + i);
    for (int d = lane; d < lanes; d += 32) row[d] = i < count && d < to.dim ? float(__ldg(from + d)) * factor : 0;
    if constexpr (kTaylor) {
      if (lane < 2) row[lanes + lane] = lane == 0 && i < count;
    } else if (i < count) {
      map_row(a.p.feature_map, row, to.dim);  // a lane reads what it wrote
    }
  }
}

// This loads [1, v] of tokens.
template <class Input>
__device__ __forceinline__ void load_values(const LinearStateArguments& a, const SharedMatrix& to, int batch, int head,
                                            std::int64_t first, int count, const StateColumns& columns) {
#pragma unroll 4
  for (int i = threadIdx.x / 32; i < a.chunk; i += kStateWarps) {
    const Input* const from = row_of<const Input>(a.p.value, batch, head, first + i) + columns.first;
    for (int c = threadIdx.x % 32; c < columns.lanes; c += 32)
      to(i, c) = i >= count || c > columns.count ? 0 : c == 0 ? 1 : float(__ldg(from + c - 1));
  }
}

// These copy the columns of a tile between a state, of which null is 0, and shared memory, whose rows are whole tiles
// of a product. Of the ones one tile alone stores the column, and reads it where it `counts_once`.
__device__ __forceinline__ void load_state(const LinearStateArguments& a, const SharedMatrix& to, const float* from,
                                           std::int64_t row_stride, const StateColumns& columns,
                                           bool counts_once = false) {
#pragma unroll 4
  for (int f = threadIdx.x / 32; f < round_to(a.features, 16); f += kStateWarps)
    for (int c = threadIdx.x % 32; c < columns.lanes; c += 32) {
      const bool inside = from && f < a.features && c <= columns.count && !(counts_once && c == 0 && columns.first > 0);
      to(f, c) = inside ? __ldg(from + f * row_stride + columns.place(a, c)) : 0;
    }
}
// A segment goes on from the sum of those before it, or, if it is the only one or sees all tokens, from `whole`.
__device__ __forceinline__ void load_start(const LinearStateArguments& a, const SharedMatrix& to, const Tensor& whole,
                                           const StateUnit& unit, const StateColumns& columns, bool counts_once) {
  if (a.p.is_causal && a.segments > 1) return load_state(a, to, unit.state(a), a.p.value_dim + 1, columns, counts_once);
  const float* const from = whole.data ? row_of<const float>(whole, unit.batch, unit.head, 0) : nullptr;
  load_state(a, to, from, whole.row_stride, columns, counts_once);
}
__device__ __forceinline__ void store_state(const LinearStateArguments& a, const SharedMatrix& from, float* to,
                                            const StateColumns& columns) {
  const int row_size = int(a.p.value_dim) + 1;
  for (int f = threadIdx.x / 32; f < a.features; f += kStateWarps)
    for (int c = threadIdx.x % 32; c <= columns.count; c += 32)
      if (c > 0 || columns.first == 0) to[std::int64_t(f) * row_size + columns.place(a, c)] = from(f, c);
}

// This adds the features of a chunk's rows, times the numbers of its tokens, to a state.
template <bool kExactNumbers, bool kTaylor>
__device__ __forceinline__ void add_to_state(const SharedMatrix& state, const StateRows<kTaylor>& rows,
                                             const SharedMatrix& numbers, int feature_lanes, int lanes, int tokens) {
  constexpr int kBlocks = 5;
  for_each_split_tile<kBlocks, kStateThreads>(
      feature_lanes, lanes, [&](SplitTile<kBlocks>& tile, int first, int column, int blocks) {
        tile.template add_product<false, kExactNumbers>(
            [&](int f, int token) { return rows.feature(token, first + f); },
            [&](int token, int c) { return numbers(token, column + c); }, tokens, blocks);
        tile.for_each(blocks, [&](int f, int c, float sum) { state(first + f, column + c) += sum; });
      });
}

// This makes the weights of the pairs of a chunk, [query][key], of which a query sees the keys up to its own:
// visit(query, key, product) says what is stored.
template <bool kTaylor, class Visit>
__device__ __forceinline__ void multiply_pairs(const SharedMatrix& to, const StateRows<kTaylor>& queries,
                                               const StateRows<kTaylor>& keys, int chunk, const Visit& visit) {
  constexpr int kBlocks = 2;
  for_each_split_tile<kBlocks, kStateThreads>(
      chunk, chunk, [&](SplitTile<kBlocks>& tile, int query, int key, int blocks) {
        if (key < query + kTileRows)
          tile.template add_product<false, kTaylor>([&](int i, int d) { return queries.x(query + i, d); },
                                                    [&](int d, int j) { return keys.x(key + j, d); }, queries.one(),
                                                    blocks);
        tile.for_each(blocks, [&](int i, int j, float product) {
          to(query + i, key + j) = key + j <= query + i ? visit(product) : 0;
        });
      });
}

// The weight of a pair, of the product of its rows.
template <bool kTaylor>
__device__ __forceinline__ float pair_weight(float t) {
  return kTaylor ? fmaf(fmaf(t, 0.5f, 1.0f), t, 1.0f) : t;
}

}  // namespace attnx::cuda
