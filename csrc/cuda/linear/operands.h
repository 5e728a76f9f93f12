// The kernels of linear attention share this: where a block stands, phi of rows in shared memory, and fragments.
#pragma once

#include "cuda/common/reduce.h"
#include "cuda/common/sequence.h"
#include "cuda/common/tile.h"
#include "cuda/linear/arguments.h"
#include "cuda/storage/strided.h"

namespace attnx::cuda {

template <int kDim>
using LinearTile = SharedTile<kLinearRows, kDim>;

// This is a unit of a launch.
struct LinearUnit {
  int index, batch, key_head;  // index: among those of the launch
  Sequence sequence;

  __device__ __forceinline__ LinearUnit(const LinearArguments& args, int index) : index(index) {
    const std::int64_t unit = args.first_unit + index;
    batch = int(unit / args.heads_k);
    key_head = int(unit % args.heads_k);
    sequence = sequence_of(args, batch);
  }
};

// This is a tile of queries, or of keys, whose number is that of a block of threads. Kernels ask for it again once
// their sums have filled the registers.
struct QueryTile : LinearUnit {
  int head, head_in_launch;  // the latter counts the heads of the launch
  int row_begin, block;

  static __device__ __forceinline__ QueryTile of(const LinearArguments& args, int index) {
    const int row_begin = args.query_blocks.split(index) * kLinearRows;
    const LinearUnit unit(args, index / args.heads_of_unit);
    return {unit, unit.key_head * args.heads_of_unit + index % args.heads_of_unit, index, row_begin,
            row_begin / args.block_q};
  }
  // This is the sum over the scope of the tile's block.
  template <class Input>
  __device__ __forceinline__ const Input* sum(const LinearArguments& args) const {
    return static_cast<const Input*>(args.by_query) +
           (std::int64_t(head_in_launch) * args.query_blocks_of_head + block) * args.state.size;
  }
};
struct KeyTile : LinearUnit {
  int row_begin, block;

  static __device__ __forceinline__ KeyTile of(const LinearArguments& args, int index) {
    const int tiles = (int(args.length_k) + kLinearRows - 1) / kLinearRows, row_begin = index % tiles * kLinearRows;
    return {LinearUnit(args, index / tiles), row_begin, row_begin / args.block_k};
  }
  // This is the sum over the blocks of queries whose scope holds the tile's block.
  template <class Input>
  __device__ __forceinline__ const Input* sum(const LinearArguments& args) const {
    return static_cast<const Input*>(args.by_key) +
           (std::int64_t(index) * args.key_blocks_of_head + block) * args.state.size;
  }
};

// This says which blocks of keys a block of queries sees: all of its queries see [0, all), some see [0, some).
struct SeenBlocks {
  int all, some;
};
__device__ __forceinline__ SeenBlocks seen_blocks(const LinearArguments& args, const Sequence& s, int query_block) {
  const int first = query_block * args.block_q, last = min(first + args.block_q, s.length_q) - 1;
  if (last < first) return {0, 0};
  const auto ceiling = [&](int keys) { return (max(keys, 0) + args.block_k - 1) / args.block_k; };
  const int end = s.band.visible(first).end;
  return {end == s.band.length_k ? ceiling(end) : max(end, 0) / args.block_k, ceiling(s.band.visible(last).end)};
}

__device__ __forceinline__ const std::int8_t* labels_of(const LinearArguments& args, int batch, int head,
                                                        int query_block) {
  return args.labels + batch * args.labels_batch_stride + head * args.labels_head_stride +
         query_block * args.labels_row_stride;
}
__device__ __forceinline__ bool in_scope(const LinearArguments& args, int label) {
  return label >= args.scope_low && label <= args.scope_high;
}
__device__ __forceinline__ float scope_scale(const LinearArguments& args, int batch, int head, int query_block) {
  return args.scope_scales[(batch * args.heads_q + head) * args.query_blocks_of_head + query_block];
}

// This starts copying rows [row, end) of a head to a tile, and what is not there becomes 0. `first` counts the rows of
// the tensor before the sequence.
template <class Input, class Tile, int kThreads>
struct RowLoader {
  const LinearArguments& args;
  int batch;

  __device__ __forceinline__ void operator()(std::uint32_t tile, const Tensor& x, int head, std::int64_t first, int row,
                                             int end, std::int64_t features) const {
    const StridedRows<const Input> rows{rows_of<const Input>(x, batch, head, first), x.row_stride};
    if (args.aligned)
      load_tile<true, Tile, kThreads>(tile, rows, row, end, int(features));
    else
      load_tile<false, Tile, kThreads>(tile, rows, row, end, int(features));
  }
};
// This starts copying rows of a state's matrix to a tile.
template <class Input, class Tile, int kThreads>
__device__ __forceinline__ void load_state(std::uint32_t tile, const StateShape& shape, const Input* state, int row) {
  load_tile<true, Tile, kThreads>(tile, StridedRows<const Input>{state, shape.value_lanes}, row, shape.features,
                                  shape.value_lanes);
}
// All threads of the block see all copies.
__device__ __forceinline__ void finish_copies() {
  commit_copies();
  wait_copies<0>();
  __syncthreads();
}

__device__ __forceinline__ float2 unpack(std::uint32_t x, __half) {
  return __half22float2(*reinterpret_cast<const __half2*>(&x));
}
__device__ __forceinline__ float2 unpack(std::uint32_t x, __nv_bfloat16) {
  return {__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u)};
}

// The threads of a block share the rows of a tile: this calls visit(column, pair) for the thread's part of its row, and
// puts what it returns in the place of the pair.
template <class Input, class Tile, int kThreads, class Visit>
__device__ __forceinline__ void for_each_pair(std::uint32_t tile, const Visit& visit) {
  constexpr int kParts = kThreads / Tile::kRows;
  const int row = threadIdx.x / kParts;
#pragma unroll 1
  for (int chunk = threadIdx.x % kParts; chunk < Tile::kChunks; chunk += kParts) {
    const std::uint32_t at = tile + Tile::offset(row, chunk);
    const uint4 x = load_shared(at);
    std::uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = visit(chunk * 8 + i * 2, words[i]);
    store_shared(at, make_uint4(words[0], words[1], words[2], words[3]));
  }
}
// This sums over the threads of a row.
template <int kParts>
__device__ __forceinline__ float sum_of_parts(float x) {
#pragma unroll
  for (int i = 1; i < kParts; i *= 2) x += __shfl_xor_sync(~0u, x, i);
  return x;
}

// Rows of a tile become phi of them, times a factor of the thread's row. The factor is 0 for rows that are not there,
// and features that are not there become 0.
template <class Input, class Tile, int kThreads>
__device__ __forceinline__ void map_features(std::uint32_t tile, FeatureMap map, int features, float factor) {
  constexpr int kParts = kThreads / Tile::kRows;
  const auto change = [&](const auto& phi) {
    for_each_pair<Input, Tile, kThreads>(tile, [&](int column, std::uint32_t word) {
      const float2 x = unpack(word, Input());
      return pack(column < features ? phi(x.x) * factor : 0.0f, column + 1 < features ? phi(x.y) * factor : 0.0f,
                  Input());
    });
  };
  if (map == FeatureMap::kSoftmax) {
    float highest = -INFINITY, sum = 0;
    const auto read = [&](const auto& use) {
      for_each_pair<Input, Tile, kThreads>(tile, [&](int column, std::uint32_t word) {
        const float2 x = unpack(word, Input());
        if (column < features) use(x.x);
        if (column + 1 < features) use(x.y);
        return word;
      });
    };
    read([&](float x) { highest = fmaxf(highest, x); });
#pragma unroll
    for (int i = 1; i < kParts; i *= 2) highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, i));
    const auto weight = [&](float x) { return exp2_approx((x - highest) * kLog2E); };
    read([&](float x) { sum += weight(x); });
    factor /= sum_of_parts<kParts>(sum);
    change(weight);
  } else if (map == FeatureMap::kElu) {
    change([](float x) { return x > 0 ? x + 1 : exp2_approx(x * kLog2E); });
  } else {
    change([](float x) { return x < 0 ? 0 : x; });  // a NaN stays
  }
}

// This is the dot product of the thread's row of a tile with numbers in shared memory, by all threads of the row.
template <class Input, class Tile, int kThreads>
__device__ __forceinline__ float dot_row(std::uint32_t tile, const float* numbers) {
  constexpr int kParts = kThreads / Tile::kRows;
  const int row = threadIdx.x / kParts;
  float sum = 0;
#pragma unroll 2
  for (int chunk = threadIdx.x % kParts; chunk < Tile::kChunks; chunk += kParts) {
    const uint4 x = load_shared(tile + Tile::offset(row, chunk));
    const std::uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack(words[i], Input());
      sum = fmaf(pair.x, numbers[chunk * 8 + i * 2], sum);
      sum = fmaf(pair.y, numbers[chunk * 8 + i * 2 + 1], sum);
    }
  }
  return sum_of_parts<kParts>(sum);
}

// This reads the last column of a state as numbers in shared memory, with zeros behind it.
template <class Input, int kDim, int kThreads>
__device__ __forceinline__ void read_last_column(float* to, const StateShape& shape, const Input* state) {
  for (int d = threadIdx.x; d < kDim; d += kThreads) to[d] = d < shape.features ? float(state[shape.last + d]) : 0.0f;
}

// This is operand A from some column of a tile on.
template <class Tile>
struct ColumnsA {
  OperandA<Tile> whole;
  int first;
  __device__ __forceinline__ void load(std::uint32_t (&x)[4], int m, int k) const { whole.load(x, m, k + first); }
};

// This is operand A made from a warp's accumulators of 16 rows, rounded.
template <int kColumns>
struct RoundedA {
  std::uint32_t x[kColumns / 16][4];

  template <class Input>
  __device__ __forceinline__ RoundedA(const float (&c)[1][kColumns / 8][4], Input) {
#pragma unroll
    for (int k = 0; k < kColumns / 16; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float (&from)[4] = c[0][k * 2 + i / 2];
        x[k][i] = pack(from[i % 2 * 2], from[i % 2 * 2 + 1], Input());
      }
  }
  __device__ __forceinline__ void load(std::uint32_t (&to)[4], int, int k) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = x[k / 16][i];
  }
};

// These are products of a warp's 16 queries, from `query` on, and 64 keys: hidden ones become 0, and the others are
// scaled.
__device__ __forceinline__ void hide(Accumulators<16, kLinearRows>& s, const Sequence& sequence, int query, int key,
                                     float scale) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = query + lane / 4 + half * 8;
    const int end = row < sequence.length_q ? sequence.band.visible(row).end - key : 0;
#pragma unroll
    for (int n = 0; n < kLinearRows / 8; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = s[0][n][half * 2 + e];
        x = n * 8 + lane % 4 * 2 + e < end ? x * scale : 0.0f;
      }
  }
}
// This does the same for a warp's 16 keys and 64 queries.
__device__ __forceinline__ void hide_transposed(Accumulators<16, kLinearRows>& s, const Sequence& sequence, int query,
                                                int key, float scale) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < kLinearRows / 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int column = query + n * 8 + lane % 4 * 2 + e % 2, row = key + lane / 4 + e / 2 * 8;
      float& x = s[0][n][e];
      x = column < sequence.length_q && row < sequence.band.visible(column).end ? x * scale : 0.0f;
    }
}

}  // namespace attnx::cuda
