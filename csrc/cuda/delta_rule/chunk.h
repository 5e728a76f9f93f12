// This is a chunk of tokens of the gated delta rule in shared memory, and the products that forward and backward share.
#pragma once

#include "cuda/common/ptx.h"
#include "cuda/common/shared_arena.h"
#include "cuda/delta_rule/arguments.h"

namespace attnx::cuda {

// These are the columns of a head that a block takes.
struct DeltaUnit {
  int batch, head, key_head;
  std::int64_t of_launch;   // head, among those of the launch
  int first, count, lanes;  // columns

  __device__ __forceinline__ DeltaUnit(const DeltaRuleArguments& a, int index) : of_launch(index / a.tiles) {
    const std::int64_t all = a.first_head + of_launch;
    batch = int(all / a.p.heads_v);
    head = int(all % a.p.heads_v);
    key_head = head / int(a.p.heads_v / a.p.heads_k);
    first = index % a.tiles * a.width;
    count = min(a.width, int(a.p.value_dim) - first);
    lanes = a.width;
  }
};

template <class Element>
__device__ __forceinline__ Element* row_of(const Tensor& x, int batch, int head, std::int64_t row) {
  return static_cast<Element*>(x.data) + batch * x.batch_stride + head * x.head_stride + row * x.row_stride;
}

// These are the exponentials of the sums G of log decays of a chunk, and beta. Beyond the last token G stays, and beta
// is 0.
struct DeltaGates {
  double sums[kMaxDeltaChunk];       // G: differences of large sums are small numbers
  float from_start[kMaxDeltaChunk];  // e^G_i
  float to_end[kMaxDeltaChunk];      // e^(G_n - G_i)
  float beta[kMaxDeltaChunk];

  __device__ __forceinline__ float whole() const { return from_start[kMaxDeltaChunk - 1]; }
  // e^(G_i - G_j)
  __device__ __forceinline__ float decay(int i, int j) const { return expf(float(sums[i] - sums[j])); }

  // The first warp reads them.
  __device__ __forceinline__ void read(const DeltaRuleArguments& a, int batch, int head, std::int64_t first,
                                       int count) {
    // e to it is 0; differences between the sums of what is no number, as -inf, would not be numbers.
    constexpr double kForgets = -1000;
    if (threadIdx.x >= 32) return;
    const auto number = [&](const PerToken& x, int i) {
      return static_cast<const float*>(
          x.data)[batch * x.batch_stride + head * x.head_stride + (first + i) * x.row_stride];
    };
    double before = 0;
#pragma unroll
    for (int part = 0; part < kMaxDeltaChunk; part += 32) {
      const int i = part + int(threadIdx.x);
      double sum = i < count ? fmax(kForgets, double(number(a.p.log_decay, i))) : 0;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const double other = __shfl_up_sync(~0u, sum, step);
        if (int(threadIdx.x) >= step) sum += other;
      }
      sums[i] = sum += before;
      before = __shfl_sync(~0u, sum, 31);
      beta[i] = i < count ? number(a.p.beta, i) : 0;
      from_start[i] = expf(float(sum));
    }
    for (int i = threadIdx.x; i < kMaxDeltaChunk; i += 32) to_end[i] = expf(float(before - sums[i]));
  }
};

// These are rows of 16 bits in shared memory, which products take as they are.
template <class Input>
struct InputRows {
  Input* data;
  int pitch;

  static __host__ __device__ InputRows take(SharedArena& arena, int rows, int columns) {
    const int pitch = round_to(columns + 8, 16) - 8;  // 8 rows lie in different banks
    return {arena.take<Input>(rows * pitch), pitch};
  }
  __device__ __forceinline__ float operator()(int i, int j) const { return float(data[i * pitch + j]); }
};

// This loads some columns of a chunk's rows of a head, and zeros beyond them. It only begins to, where rows lie on 16
// bytes: finish_rows() has to follow.
template <class Input>
__device__ __forceinline__ void load_rows(const InputRows<Input>& to, const Tensor& x, int batch, int head,
                                          std::int64_t first, int count, int rows, int first_column, int columns,
                                          int lanes) {
  constexpr int kVector = 16 / sizeof(Input);
  const Input* const begin = row_of<const Input>(x, batch, head, first) + first_column;
  if (reinterpret_cast<std::uintptr_t>(begin) % 16 == 0 && x.row_stride % kVector == 0 && columns % kVector == 0) {
    const int vectors = lanes / kVector;
    for (int i = threadIdx.x; i < rows * vectors; i += kDeltaThreads) {
      const int row = i / vectors, d = i % vectors * kVector;
      copy_async(shared_address(to.data + row * to.pitch + d), begin + row * x.row_stride + d,
                 row < count && d < columns);
    }
    return;
  }
#pragma unroll 4
  for (int i = threadIdx.x / 32; i < rows; i += kDeltaWarps)
    for (int d = threadIdx.x % 32; d < lanes; d += 32)
      to.data[i * to.pitch + d] = i < count && d < columns ? __ldg(begin + i * x.row_stride + d) : Input(0.0f);
}
__device__ __forceinline__ void finish_rows() {
  commit_copies();
  wait_copies<0>();
  __syncthreads();
}

// These copy the columns of a unit between states in global memory, of which null is 0, and shared memory.
__device__ __forceinline__ void load_state(const SharedMatrix& to, const float* from, std::int64_t row_stride,
                                           int key_dim, const DeltaUnit& unit) {
#pragma unroll 4
  for (int k = threadIdx.x / 32; k < round_to(key_dim, 16); k += kDeltaWarps)
    for (int d = threadIdx.x % 32; d < unit.lanes; d += 32)
      to(k, d) = from && k < key_dim && d < unit.count ? __ldg(from + k * row_stride + unit.first + d) : 0;
}
__device__ __forceinline__ void store_columns(const SharedMatrix& from, float* to, int rows, int value_dim,
                                              const DeltaUnit& unit) {
  for (int k = threadIdx.x / 32; k < rows; k += kDeltaWarps)
    for (int d = threadIdx.x % 32; d < unit.count; d += 32) to[k * value_dim + unit.first + d] = from(k, d);
}

// This multiplies rows of queries or keys by keys, [row][key], for the pairs of a row and the keys up to its own:
// visit(row, key, product) says what is stored.
template <class Input, class Visit>
__device__ __forceinline__ void multiply_pairs(const SharedMatrix& to, const InputRows<Input>& rows,
                                               const InputRows<Input>& keys, int count, int key_lanes,
                                               const Visit& visit) {
  constexpr int kBlocks = 2;
  for_each_split_tile<kBlocks, kDeltaThreads>(
      count, count, [&](SplitTile<kBlocks>& tile, int row, int key, int blocks) {
        if (key < row + kTileRows)
          tile.template add_product<true, true>([&](int i, int d) { return rows(row + i, d); },
                                                [&](int d, int j) { return keys(key + j, d); }, key_lanes, blocks);
        tile.for_each(blocks, [&](int i, int j, float product) {
          to(row + i, key + j) = key + j <= row + i ? visit(row + i, key + j, product) : 0;
        });
      });
}

// This solves (I + L) X = X in place, for L strictly lower triangular, of which `lower(i, j)` gives the number for
// j < i. Blocks of 16 rows follow each other: a thread solves a column of each, and a product takes it from the rest.
template <class Lower>
__device__ __forceinline__ void solve_unit_lower(const SharedMatrix& x, const Lower& lower, int rows, int columns) {
  constexpr int kBlocks = 2;
#pragma unroll 1
  for (int first = 0; first < rows; first += kTileRows) {
    for (int column = threadIdx.x; column < columns; column += kDeltaThreads) {
      float solved[kTileRows];
#pragma unroll
      for (int i = 0; i < kTileRows; ++i) {
        float sum = x(first + i, column);
#pragma unroll
        for (int j = 0; j < i; ++j) sum = fmaf(-lower(first + i, first + j), solved[j], sum);
        x(first + i, column) = solved[i] = sum;
      }
    }
    __syncthreads();
    const int rest = first + kTileRows;
    for_each_split_tile<kBlocks, kDeltaThreads>(
        rows - rest, columns, [&](SplitTile<kBlocks>& tile, int row, int column, int blocks) {
          tile.template add_product<false, false>([&](int i, int j) { return lower(rest + row + i, first + j); },
                                                  [&](int j, int d) { return x(first + j, column + d); }, kTileRows,
                                                  blocks);
          tile.for_each(blocks, [&](int i, int d, float sum) { x(rest + row + i, column + d) -= sum; });
        });
    __syncthreads();
  }
}

// This turns the state before the chunk into that after it: to_end * corrections are stored for the keys.
template <class Input>
__device__ __forceinline__ void advance(const SharedMatrix& state, const InputRows<Input>& keys,
                                        const SharedMatrix& corrections, const DeltaGates& gates, int key_lanes,
                                        int lanes, int tokens) {
  constexpr int kBlocks = 4;
  const float whole = gates.whole();
  for_each_split_tile<kBlocks, kDeltaThreads>(
      key_lanes, lanes, [&](SplitTile<kBlocks>& tile, int key, int column, int blocks) {
        tile.template add_product<true, false>(
            [&](int k, int i) { return keys(i, key + k); },
            [&](int i, int d) { return corrections(i, column + d) * gates.to_end[i]; }, tokens, blocks);
        tile.for_each(blocks, [&](int k, int d, float sum) {
          float& own = state(key + k, column + d);
          own = fmaf(whole, own, sum);
        });
      });
}

}  // namespace attnx::cuda
