// The backward mainloop for sm_90a: dK and dV of a tile of keys, and its part of dQ, by wgmma on tiles that TMA brings
// (FlashAttention-3, Shah et al. 2024).
//
// A block owns a tile of keys and walks over the tiles of rows (query, head of the group) that see it. One thread of
// its first warpgroup, the producer, has copies made: K and V once, Q and dO in rings of two stages. The others are
// consumers. They compute transposed: S^T and dP^T come out of the tensor cores as the next products want their operand
// A, so that P never passes through shared memory. dQ sums over all keys of the tile, and is the only product whose
// operand does. It is summed in global memory in float32, four sums of a thread at a time, in the order of the threads'
// registers; a last pass scales, rounds and puts them in place. Deterministic, the tiles of keys add in order.
//
// Consumers share the work in one of two ways.
//
// By keys, where dK and dV of 64 keys fit a warpgroup's registers. A step of each:
//
//   S^T = K Q^T starts, behind the last step's dK | wait for all | place logits, if the tile is not whole | 16 rows at
//   a time: weights are made and packed, dV += P^T dO starts | the last step's dQ = dS K, to global memory | dP^T = V
//   dO^T | 16 rows at a time: dS = derivative * (dP - delta) is packed, dK += dS^T Q starts, and dS goes to shared
//   memory
//
// By product, where they do not: of the same 64 keys one warpgroup has dV, the other dK. What weights multiply their
// gradients with, in float32, passes from the one to the other.
//
//   weights:    S^T = K Q^T | 16 rows at a time: weights, derivatives to shared memory, dV += P^T dO starts | half of
//               the last step's dQ
//   gradients:  dP^T = V dO^T | 16 rows at a time: dS, to shared memory too, dK += dS^T Q starts | the other half of dQ
//
// What a row adds to its logits comes from an earlier pass, which for the sigmoid reads no tensor. The sigmoid has no
// delta.
#pragma once

#include "cuda/sm90/backward_warpgroup.h"

namespace attnx::cuda {

// A consumer warpgroup with keys of its own.
template <class Warpgroup>
__device__ __forceinline__ void consume_by_keys(const Warpgroup& own) {
  using ScorePolicy = typename Warpgroup::ScorePolicy;
  using Tile = typename Warpgroup::Tile;
  const auto& args = own.args;
  const auto& shared = own.shared;
  own.wait_for_keys();

  typename Warpgroup::GradKeys grad_keys, grad_values;
  clear(grad_keys);
  clear(grad_values);

  Step<Tile::kStages> step;
  Step<Tile::kLogitStages> logit_step;
  int last_tile = -1, last_before = 0;  // of the last step, whose dQ is to come
  const auto add_last_grad_query = [&] {
    own.add_grad_query(Step<Tile::kLogitStages>{logit_step.number - 1}, last_tile, last_before);
  };

  while (true) {
    const int stage = step.stage();
    const std::uint32_t parity = step.parity();
    ++step.number;
    const PublishedTile tile = own.wait_for_tile(stage, parity);
    if (tile.row < 0) break;

    typename Warpgroup::Logits s;
    own.start_logits(s, own.own_keys, shared.query(stage));
    wait_products<0>();
    pin(s);
    pin(grad_keys);
    if (last_tile >= 0) own.release(shared.query_empty(stage ^ 1));

    const float multiplier = own.place(s, tile);
    wait(shared.grad_output_full(stage), parity);
#pragma unroll
    for (int c = 0; c < Warpgroup::kChunks; ++c) {
      std::uint32_t weights[4];
      own.make_weights(weights, s, c, multiplier, tile, stage);
      own.start_grad_keys(grad_values, weights, shared.grad_output(stage), c);
    }

    if constexpr (Tile::kWaitForWeights) {
      wait_products<0>();
      pin(grad_values);
    }
    if (last_tile >= 0) add_last_grad_query();
    wait_products<0>();
    pin(grad_values);

    // Once dQ and the weights have left their registers.
    typename Warpgroup::Logits grad_logits;
    own.start_logits(grad_logits, own.own_values, shared.grad_output(stage));
    wait_products<0>();
    pin(grad_logits);
    own.make_grad_logits(grad_logits, stage, [&](float (&x)[4], int n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) x[e] = s[0][n][e];
    });
    own.release(shared.grad_output_empty(stage));

    own.add_parameter_sums(grad_logits, tile);
    own.publish_grad_logits(grad_logits, grad_keys, stage, logit_step.stage());
    ++logit_step.number;
    last_tile = tile.row_tile;
    last_before = tile.before;
  }

  wait_products<0>();
  pin(grad_keys);
  if (last_tile >= 0) add_last_grad_query();

  // dK and dV, through the shared memory of K and V, once no product reads it any more.
  meet(1, Tile::kConsumers);
  const auto& call = args.call;
  own.store_grad_keys(grad_keys, args.scale, shared.key, call.grad_key, call.head_dim);
  own.store_grad_keys(grad_values, 1 / ScorePolicy::kWeightScale, shared.value(), call.grad_value, call.value_dim);
}

// The consumer warpgroup that makes weights, and dV.
template <class Warpgroup>
__device__ __forceinline__ void consume_weights(const Warpgroup& own) {
  using Tile = typename Warpgroup::Tile;
  const auto& args = own.args;
  const auto& shared = own.shared;
  own.wait_for_keys();

  typename Warpgroup::GradKeys grad_values;
  clear(grad_values);

  Step<Tile::kStages> step;
  int last_tile = -1, last_before = 0;  // of the last step, whose dQ is to come
  const auto add_last_grad_query = [&](int number) {
    own.add_grad_query(Step<Tile::kLogitStages>{number}, last_tile, last_before);
  };

  while (true) {
    const int stage = step.stage();
    const std::uint32_t parity = step.parity();
    const PublishedTile tile = own.wait_for_tile(stage, parity);
    if (tile.row < 0) break;

    typename Warpgroup::Logits s;
    own.start_logits(s, own.own_keys, shared.query(stage));
    wait_products<0>();
    pin(s);

    const float multiplier = own.place(s, tile);
    wait(shared.grad_output_full(stage), parity);
    wait(shared.derivative_empty(), step.number & 1 ^ 1);
#pragma unroll
    for (int c = 0; c < Warpgroup::kChunks; ++c) {
      std::uint32_t weights[4];
      own.make_weights(weights, s, c, multiplier, tile, stage);
      own.start_grad_keys(grad_values, weights, shared.grad_output(stage), c);
      own.store_derivatives(s, c);
    }
    own.release(shared.query_empty(stage));
    own.release(shared.derivative_full());

    if (last_tile >= 0) add_last_grad_query(step.number - 1);
    wait_products<0>();
    pin(grad_values);
    own.release(shared.grad_output_empty(stage));
    ++step.number;
    last_tile = tile.row_tile;
    last_before = tile.before;
  }

  if (last_tile >= 0) add_last_grad_query(step.number - 1);
  meet(1, Tile::kConsumers);
  own.store_grad_keys(grad_values, 1 / Warpgroup::ScorePolicy::kWeightScale, shared.value(), args.call.grad_value,
                      args.call.value_dim);
}

// The one that makes the gradients of logits, and dK.
template <class Warpgroup>
__device__ __forceinline__ void consume_gradients(const Warpgroup& own) {
  using Tile = typename Warpgroup::Tile;
  const auto& args = own.args;
  const auto& shared = own.shared;
  own.wait_for_keys();

  typename Warpgroup::GradKeys grad_keys;
  clear(grad_keys);

  for (Step<Tile::kStages> step;; ++step.number) {
    const int stage = step.stage();
    const std::uint32_t parity = step.parity();
    const PublishedTile tile = own.wait_for_tile(stage, parity);
    if (tile.row < 0) break;

    wait(shared.grad_output_full(stage), parity);
    typename Warpgroup::Logits grad_logits;
    own.start_logits(grad_logits, own.own_values, shared.grad_output(stage));
    wait_products<0>();
    pin(grad_logits);
    wait(shared.derivative_full(), step.number & 1);
    own.make_grad_logits(grad_logits, stage, [&](float (&x)[4], int n) { own.load_derivatives(x, n); });
    own.release(shared.derivative_empty());
    own.release(shared.grad_output_empty(stage));

    own.add_parameter_sums(grad_logits, tile);
    const Step<Tile::kLogitStages> logit_step{step.number};
    own.publish_grad_logits(grad_logits, grad_keys, stage, logit_step.stage());
    own.add_grad_query(logit_step, tile.row_tile, tile.before);
    pin(grad_keys);
    own.release(shared.query_empty(stage));
  }

  meet(1, Tile::kConsumers);
  own.store_grad_keys(grad_keys, args.scale, shared.key, args.call.grad_key, args.call.head_dim);
}

template <Score kScore, class Input, bool kListed, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSm)
    attnx_backward_sm90(const __grid_constant__ TmaBackwardArguments launch) {
  extern __shared__ __align__(1024) std::uint8_t shared_bytes[];
  const BackwardMemory<Tile> shared{shared_address(shared_bytes)};
  if (const auto place = BackwardPlace<kListed, Tile>::again(launch.args);
      place.key_begin >= place.sequence.band.length_k)
    return;
  if (threadIdx.x == 0) {
    shared.init_barriers();
    fence_barrier_init();
  }
  __syncthreads();

  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);  // the same in all lanes, as the compiler can see
  if (warpgroup == 0) {
    release_registers_down_to<Tile::kProducerRegisters>();
    if (threadIdx.x == 0) produce_tiles<BackwardScore<kScore, Input>::kHasDelta, kListed>(launch, shared);
  } else {
    claim_registers_up_to<Tile::kConsumerRegisters>();
    const BackwardWarpgroup<kScore, Input, kListed, Tile> own(launch.args, shared, warpgroup - 1);
    if constexpr (!Tile::kByProduct) {
      consume_by_keys(own);
    } else if (own.number == 0) {
      consume_weights(own);
    } else {
      consume_gradients(own);
    }
  }
}

// The same as store_accumulators() for the transposed: a warp's accumulators, rounded, as columns of a tile.
template <class Tile, class Input, int kN>
__device__ __forceinline__ void store_transposed(std::uint32_t tile, int row, int column, int lane,
                                                 const float (&x)[1][kN][4], float factor) {
#pragma unroll
  for (int n = 0; n < kN; n += 2) {
    std::uint32_t packed[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float (&pairs)[4] = x[0][n + i / 2];
      packed[i] = pack(pairs[i % 2 * 2] * factor, pairs[i % 2 * 2 + 1] * factor, Input());
    }
    store_matrices_transposed(tile + Tile::offset(row + n * 8 + lane / 16 * 8 + lane % 8, column / 8 + lane / 8 % 2),
                              packed);
  }
}

// dQ from its sums: the registers of attnx_backward_sm90's threads, a block a tile of rows.
template <class Input, class Tile>
__global__ void __launch_bounds__(128) attnx_grad_query_sm90(const __grid_constant__ BackwardArguments args) {
  constexpr int kM = Tile::kM, kHeadDim = Tile::kHeadDim, kColumns = Tile::kGradQueryColumns;
  using RowTile = SharedTile<kM, kHeadDim>;
  extern __shared__ uint4 shared[];
  const std::uint32_t shared_rows = shared_address(shared);

  int block = blockIdx.x;
  const int query_block = args.query_blocks.split(block), batch = block % int(args.call.batch);
  const int head = block / int(args.call.batch);
  const Sequence sequence = args.sequence(batch);
  const int row_begin = query_block * kM, row_end = sequence.length_q * args.group.divisor();
  if (row_begin >= row_end) return;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const std::int64_t row_tile = head * args.row_tiles + args.row_tile(batch, sequence, query_block, kM);
  const float4* from = reinterpret_cast<const float4*>(args.grad_query_sum + row_tile * (kM * kHeadDim)) + threadIdx.x;
#pragma unroll
  for (int part = 0; part < Tile::kGradQueryParts * Tile::kWarpgroups; ++part) {
    Accumulators<16, kColumns> grad_query;
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n)
      *reinterpret_cast<float4*>(grad_query[0][n]) = from[(part * (kColumns / 8) + n) * 128];
    const int row = Tile::first_row(part), feature = Tile::first_feature(part);
    if constexpr (Tile::kSwapGradQuery)
      store_transposed<RowTile, Input>(shared_rows, row, feature + warp * 16, lane, grad_query, args.scale);
    else
      store_accumulators<RowTile, Input>(shared_rows, row + warp * 16, feature, lane, grad_query, args.scale);
  }
  __syncthreads();
  const Tensor& to = args.call.grad_query;
  const GroupedRows<Input> rows{rows_of<Input>(to, batch, args.query_head(head), sequence.first_q), to.row_stride,
                                to.head_stride, args.group};
  store_tile<true, RowTile, kM, 128>(shared_rows, 0, rows, row_begin, row_end, int(args.call.head_dim), threadIdx.x);
}

}  // namespace attnx::cuda
