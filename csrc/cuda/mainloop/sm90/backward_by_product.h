// These consumers of the backward share the work by product: of the same 64 keys one warpgroup has dV, the other dK.
// The first passes to the second, in float32, what the gradients of its weights are multiplied with. A step does this:
//
//   weights:    S^T = K Q^T | 16 rows at a time: weights, derivatives to shared memory, dV += P^T dO starts | half of
//               the last step's dQ
//   gradients:  dP^T = V dO^T | 16 rows at a time: dS, to shared memory too, dK += dS^T Q starts | the other half of dQ
#pragma once

#include "cuda/mainloop/sm90/backward_warpgroup.h"

namespace attnx::cuda {

// This consumer warpgroup makes the weights, and dV.
template <class Warpgroup>
__device__ __forceinline__ void consume_weights(const Warpgroup& own) {
  using Tile = typename Warpgroup::Tile;
  const auto& args = own.args;
  const auto& shared = own.shared;
  own.wait_for_keys();

  typename Warpgroup::GradKeys grad_values;
  clear(grad_values);
  float divisor = 1;  // of grad_values so far

  Step<Tile::kStages> step;
  int last_tile = -1, last_before = 0;  // of the last step, whose dQ is still due
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
    own.wait_for_grad_output(stage, parity);
    own.set_divisor(grad_values, divisor, tile);
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
  own.store_grad_keys(grad_values, 1 / (Warpgroup::ScorePolicy::kWeightScale * divisor), shared.value(),
                      args.tensors.grad_value, args.value_dim,
                      [](const auto& x) -> const Tensor& { return x.grad_value_addend; });
}

// This one makes the gradients of logits, and dK.
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

    own.wait_for_grad_output(stage, parity);
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
  own.store_grad_keys(grad_keys, args.scale, shared.key, args.tensors.grad_key, args.head_dim,
                      [](const auto& x) -> const Tensor& { return x.grad_key_addend; });
}

}  // namespace attnx::cuda
