// These consumers of the backward share the work by keys: each warpgroup has dK and dV of 64 keys of its own. A step
// does this:
//
//   S^T = K Q^T starts, behind the last step's dK | wait for all | place logits, if the tile is not whole | 16 rows at
//   a time: weights are made and packed, dV += P^T dO starts | the last step's dQ = dS K, to global memory | dP^T = V
//   dO^T | 16 rows at a time: dS = derivative * (dP - delta) is packed, dK += dS^T Q starts, and dS goes to shared
//   memory
#pragma once

#include "cuda/mainloop/sm90/backward_warpgroup.h"

namespace attnx::cuda {

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
  float divisor = 1;  // of grad_values so far

  Step<Tile::kStages> step;
  Step<Tile::kLogitStages> logit_step;
  int last_tile = -1, last_before = 0;  // of the last step, whose dQ is still due
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
    own.wait_for_grad_output(stage, parity);
    own.set_divisor(grad_values, divisor, tile);
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

    // dP starts only here, because its registers held dQ and the weights until now.
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

  // dK and dV leave through the shared memory of K and V, once no product reads it any more.
  meet(1, Tile::kConsumers);
  own.store_grad_keys(grad_keys, args.scale, shared.key, args.tensors.grad_key, args.head_dim,
                      [](const auto& x) -> const Tensor& { return x.grad_key_addend; });
  own.store_grad_keys(grad_values, 1 / (ScorePolicy::kWeightScale * divisor), shared.value(), args.tensors.grad_value,
                      args.value_dim, [](const auto& x) -> const Tensor& { return x.grad_value_addend; });
}

}  // namespace attnx::cuda
