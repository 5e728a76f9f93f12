"""Every operator of ``torch.ops.attnx`` has a row; those that differ only in ``_varlen`` and ``_backward`` share it."""

from __future__ import annotations

from attnx._operators import (
    averages,
    block_sparse,
    delta_rule,
    flops,
    linear_state,
    pooling,
    probabilistic,
    routing,
    sparse_linear,
    staircase,
    tangents,
    terms,
    weights,
)
from attnx._operators.description import BackwardOperator, Formula, NoDerivative, Operator

_QKV = ("query", "key", "value")
_LISTS = NoDerivative("its results are indices")
_CACHE = NoDerivative("a cache serves inference")
_ALONG_A_DIRECTION = NoDerivative("it is one, and what attnx.reference has is differentiable any number of times")
_STATISTICS = NoDerivative("centroids move by an average of the tokens")

OPERATORS = (
    Operator(
        "sigmoid_attention",
        varlen=True,
        shapes=terms.GRADIENTS,
        vmap="heads",
        jvp=True,
        autocast=_QKV,
        flops=flops.band,
    ),
    Operator(
        "softmax_attention",
        varlen=True,
        shapes=terms.GRADIENTS,
        vmap="heads",
        jvp=True,
        autocast=_QKV,
        flops=flops.band,
    ),
    Operator(
        "sigmoid_attention_jvp",
        _ALONG_A_DIRECTION,
        fake=tangents.sigmoid_results,
        vmap="heads",
        autocast=(*_QKV, *tangents.TANGENTS),
        flops=tangents.products,
    ),
    Operator(
        "softmax_attention_jvp",
        _ALONG_A_DIRECTION,
        fake=tangents.softmax_results,
        vmap="heads",
        autocast=(*_QKV, *tangents.TANGENTS),
        flops=tangents.products,
    ),
    Operator("softplus_attention", varlen=True, vmap="heads", autocast=_QKV, flops=flops.band),
    Operator(
        "sharpened_softplus_attention",
        varlen=True,
        vmap="heads",
        autocast=_QKV,
        flops=flops.sharpened,
    ),
    Operator(
        "block_sparse_attention",
        BackwardOperator(more=block_sparse.transposed_lists),
        varlen=True,
        shapes=terms.GRADIENTS | {"grad_block_bias": block_sparse.grad_block_bias},
        autocast=_QKV,
        flops=flops.listed,
    ),
    Operator("disentangled_attention", shapes=terms.TABLE_GRADIENTS, autocast=_QKV, flops=flops.band),
    Operator(
        "attention_key_weights",
        weights.OF_KEYS,
        fake=weights.by_key,
        autocast=("query", "key"),
        flops=weights.products,
    ),
    Operator(
        "attention_row_weights",
        weights.OF_ROWS,
        fake=weights.by_pair,
        autocast=("query", "key"),
        flops=weights.products,
    ),
    Operator(
        "attention_max_logits",
        NoDerivative("a largest logit is a statistic"),
        fake=weights.by_row,
        autocast=("query", "key"),
        flops=weights.products,
    ),
    # A draw depends on the place of its head in the batch, as a block's does.
    Operator(
        "pointer_sample",
        NoDerivative("its results are indices"),
        fake=weights.index_by_row,
        autocast=("query", "key"),
        flops=weights.products,
    ),
    Operator("gated_delta_rule", shapes=delta_rule.SHAPES, autocast=_QKV, flops=delta_rule.flops),
    Operator("linear_attention", shapes=linear_state.SHAPES, autocast=_QKV, flops=linear_state.flops),
    # A block's draw depends on the place of its head in the batch, so examples as more heads would draw others.
    Operator("probabilistic_attention", varlen=True, autocast=_QKV, flops=flops.drawn),
    Operator("probabilistic_block_lists", _LISTS, fake=probabilistic.lists, refusal=probabilistic.refusal),
    Operator(
        "probabilistic_keep",
        NoDerivative("it follows from lengths alone"),
        fake=probabilistic.empty_keep,
        implementation=probabilistic.keep,
        schema=f"(Tensor seed, str family, float density, {probabilistic.GRID}) -> Tensor",
    ),
    Operator(
        "probabilistic_blocks_per_row",
        NoDerivative("it is a number of blocks"),
        fake=probabilistic.unknown_blocks_per_row,
        implementation=probabilistic.blocks_per_row,
        schema=f"(Tensor seed, str? family, float? density, {probabilistic.GRID}) -> SymInt",
    ),
    Operator(
        "block_means",
        Formula(pooling.save, pooling.gradient),
        fake=pooling.of_blocks,
        autocast=("rows",),
        refusal=pooling.refusal,
    ),
    Operator(
        "block_statistics",
        Formula(pooling.save, pooling.gradient),
        fake=pooling.two_of_blocks,
        autocast=("rows",),
        refusal=pooling.refusal,
    ),
    Operator(
        "range_means",
        NoDerivative("choices have none"),
        fake=pooling.of_ranges,
        autocast=("rows",),
        refusal=pooling.refusal,
    ),
    Operator("sparse_linear_attention", varlen=True, autocast=_QKV, flops=flops.sparse_linear),
    Operator(
        "sparse_linear_block_map",
        NoDerivative("the map has none"),
        varlen=True,
        autocast=("query", "key"),
        fake=sparse_linear.map_labels,
        flops=flops.block_means,
        refusal=sparse_linear.refusal,
    ),
    Operator(
        "sparse_linear_labels",
        _LISTS,
        fake=sparse_linear.labels,
        implementation=sparse_linear.labels_by_sorting,
    ),
    Operator(
        "routing_attention",
        shapes={
            "logsumexp": routing.logsumexp,
            "grad_memory_key": routing.memory_key,
            "grad_memory_value": routing.memory_value,
        },
        autocast=(*_QKV, "memory_key", "memory_value"),
        flops=flops.clusters,
    ),
    Operator("route", _LISTS, varlen=True, fake=routing.routes, refusal=routing.refusal, flops=flops.centroids),
    Operator("nearest_centroids", _LISTS, fake=routing.nearest, refusal=routing.refusal, flops=flops.centroids),
    Operator("centroid_sums", _STATISTICS, fake=routing.sums, refusal=routing.refusal, flops=flops.centroids),
    Operator("update_centroids_", _STATISTICS, refusal=routing.refusal),
    # It is an operator of its own because compilers and checkpoints alike leave a change in a backward where it stands.
    Operator(
        "move_centroids_in_backward",
        Formula(routing.save_what_moves, routing.move),
        fake=routing.same_query,
        implementation=routing.copy_query,
        schema=f"(Tensor query, Tensor key, Tensor centroids, Tensor counts, {routing.LENGTHS}, float decay, "
        "str group) -> Tensor",
    ),
    Operator(
        "move_average_in_backward",
        Formula(averages.save, averages.move),
        fake=averages.same,
        implementation=averages.copy,
        schema="(Tensor x, Tensor average, Tensor target, float decay) -> Tensor",
    ),
    Operator(
        "staircase_attention",
        _CACHE,
        shapes={"output": staircase.output},
        autocast=("query",),
        autocast_like="tail",
        flops=flops.cached,
        refusal=staircase.refusal,
    ),
    Operator("staircase_append_", _CACHE, autocast=("key", "value"), autocast_like="tail", refusal=staircase.refusal),
    Operator("staircase_crop_", _CACHE, refusal=staircase.refusal),
    Operator("staircase_assign_", _CACHE, refusal=staircase.refusal),
    Operator("staircase_dequantize", _CACHE, fake=staircase.rows, refusal=staircase.refusal),
)
