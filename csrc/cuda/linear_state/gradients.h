// The kernels of the backward of linear attention with a state share this. With y = N / n of a row,
// G = [-(dO . y) / n, dO / n] is the gradient of [n, N]: the states S give dphi(Q) = G S^T, and T, the sum of
// phi(q) G^T of later queries on the gradient of the last state, gives dphi(K) = [1, V] T^T and dV = phi(K) T.
#pragma once

#include "cuda/linear_state/kernels.h"
#include "cuda/linear_state/tokens.h"

namespace attnx::cuda {

// This loads G of rows of queries. The first column counts in one tile.
template <class Input>
__device__ __forceinline__ void load_gradients(const LinearStateArguments& a, const StateRowNumbers& rows,
                                               const SharedMatrix& to, int batch, int head, std::int64_t first,
                                               int count, const StateColumns& columns) {
  const std::int64_t all = a.p.batch * a.p.heads_q * a.p.length_q;
  const std::int64_t place = (batch * a.p.heads_q + head) * a.p.length_q + first;
  for (int i = threadIdx.x / 32; i < a.chunk; i += kStateWarps) {
    const bool inside = i < count && rows.grad_output.data;
    const float n = inside ? rows.sums[place + i] : 0, factor = n == 0 ? 0 : 1 / n;
    const Input* const grad =
        inside ? row_of<const Input>(rows.grad_output, batch, head, first + i) + columns.first : nullptr;
    for (int c = threadIdx.x % 32; c < columns.lanes; c += 32) {
      float x = 0;
      if (inside && c > 0 && c <= columns.count) x = float(grad[c - 1]);
      if (inside && c == 0 && columns.first == 0)
        for (int tile = 0; tile < a.tiles; ++tile) x -= rows.dots[tile * all + place + i];
      to(i, c) = x * factor;
    }
  }
}

// So many features of a chunk have their gradients in shared memory at a time.
inline constexpr int kFeatureSlab = 64;

// This sets the gradients of a chunk's rows to what their features have: the product of numbers of tokens and a state.
template <bool kExactNumbers, bool kTaylor>
__device__ __forceinline__ void differentiate_rows(const SharedMatrix& to, const StateRows<kTaylor>& rows,
                                                   const SharedMatrix& numbers, const SharedMatrix& state,
                                                   const SharedMatrix& slab, int feature_lanes, int lanes, int tokens) {
  constexpr int kBlocks = 4;
  const int dim = rows.dim;
#pragma unroll 1
  for (int begin = 0; begin < feature_lanes; begin += kFeatureSlab) {
    const int size = min(kFeatureSlab, feature_lanes - begin);
    for_each_split_tile<kBlocks, kStateThreads>(
        tokens, size, [&](SplitTile<kBlocks>& tile, int row, int feature, int blocks) {
          tile.template add_product<kExactNumbers, false>([&](int i, int c) { return numbers(row + i, c); },
                                                          [&](int c, int f) { return state(begin + feature + f, c); },
                                                          lanes, blocks);
          tile.for_each(blocks, [&](int i, int f, float sum) { slab(row + i, feature + f) = sum; });
        });
    __syncthreads();
    for (int i = threadIdx.x / 32; i < tokens; i += kStateWarps)
      for (int d = threadIdx.x % 32; d < rows.one(); d += 32) {
        float sum = begin == 0 ? 0 : to(i, d);
        const auto grad = [&](int f) { return f >= begin && f < begin + size ? slab(i, f - begin) : 0; };
        if constexpr (!kTaylor) {
          sum += grad(d);
        } else if (d < dim) {
          sum += grad(1 + d);
          for (int e = 0; e < dim; ++e) {
            const int low = min(d, e), high = max(d, e);
            const float factor = d == e ? 1.41421356f : 1.0f;
            sum = fmaf(grad(1 + dim + low * dim - low * (low - 1) / 2 + high - low), factor * rows.x(i, e), sum);
          }
        }
        to(i, d) = sum;
      }
    __syncthreads();
  }
}

// This makes the gradients of the products of a chunk's pairs, [query][key], and, into `weights`, their weights.
template <bool kTaylor, bool kWithWeights>
__device__ __forceinline__ void differentiate_pairs(const SharedMatrix& to, const SharedMatrix& weights,
                                                    const StateRows<kTaylor>& queries, const StateRows<kTaylor>& keys,
                                                    const SharedMatrix& gradients, const SharedMatrix& values,
                                                    int lanes, int chunk) {
  constexpr int kBlocks = 2;
  for_each_split_tile<kBlocks, kStateThreads>(
      chunk, chunk, [&](SplitTile<kBlocks>& grads, int query, int key, int blocks) {
        SplitTile<kBlocks> products;
        if (key < query + kTileRows) {
          grads.template add_product<false, true>([&](int i, int c) { return gradients(query + i, c); },
                                                  [&](int c, int j) { return values(key + j, c); }, lanes, blocks);
          if (kTaylor || kWithWeights)
            products.template add_product<false, kTaylor>([&](int i, int d) { return queries.x(query + i, d); },
                                                          [&](int d, int j) { return keys.x(key + j, d); },
                                                          queries.one(), blocks);
        }
        grads.for_each(blocks, products, [&](int i, int j, float grad, float t) {
          const bool seen = key + j <= query + i;
          to(query + i, key + j) = seen ? grad * (kTaylor ? 1 + t : 1.0f) : 0;
          if constexpr (kWithWeights) weights(query + i, key + j) = seen ? pair_weight<kTaylor>(t) : 0;
        });
      });
}

// This adds the product of two matrices, whose places a(row, step) and b(step, column) read, to a third.
template <bool kExactB, class A, class B>
__device__ __forceinline__ void add_product(const SharedMatrix& to, const A& a, const B& b, int rows, int columns,
                                            int steps) {
  constexpr int kBlocks = 4;
  for_each_split_tile<kBlocks, kStateThreads>(
      rows, columns, [&](SplitTile<kBlocks>& tile, int row, int column, int blocks) {
        tile.template add_product<false, kExactB>([&](int i, int k) { return a(row + i, k); },
                                                  [&](int k, int d) { return b(k, column + d); }, steps, blocks);
        tile.for_each(blocks, [&](int i, int d, float sum) { to(row + i, column + d) += sum; });
      });
}

// This stores a tile's part of the gradients of rows.
__device__ __forceinline__ void store_part(const StateGradArguments& a, const SharedMatrix& from, int tile,
                                           std::int64_t heads, std::int64_t head, std::int64_t length,
                                           std::int64_t first, int count) {
  const int dim = int(a.p.head_dim);
  float* const to = a.grad_rows + ((tile * heads + head) * length + first) * dim;
  for (int i = threadIdx.x / 32; i < count; i += kStateWarps)
    for (int d = threadIdx.x % 32; d < dim; d += 32) to[i * dim + d] = from(i, d);
}

}  // namespace attnx::cuda
