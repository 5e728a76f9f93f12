"""A few valid calls of every operator of torch.ops.attnx, recorded from the functions that users call."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

import attnx
from attnx._operators.schema import Arguments, signature
from attnx._operators.table import OPERATORS
from calls import RecordedCalls

NAMES = [name for row in OPERATORS for name in row.names]


def _differentiate(function: Any, inputs: list[Tensor], *more: Any, **options: Any) -> None:
    leaves = [x.detach().requires_grad_() for x in inputs]
    results = function(*leaves, *more, **options)
    results = results if isinstance(results, tuple) else (results,)
    torch.autograd.grad(sum(x.float().sum() for x in results), leaves, allow_unused=True)


def _draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def _pointwise(dtype: torch.dtype) -> None:
    dense = [_draw(2, 4, 20, 16, dtype=dtype), _draw(2, 2, 30, 16, dtype=dtype), _draw(2, 2, 30, 8, dtype=dtype)]
    packed = [_draw(50, 4, 16, dtype=dtype), _draw(60, 2, 16, dtype=dtype), _draw(60, 2, 8, dtype=dtype)]
    offsets = torch.tensor([0, 20, 20, 50], dtype=torch.int32), torch.tensor([0, 10, 30, 60], dtype=torch.int32)
    heads = torch.rand(4), torch.rand(4)
    _differentiate(attnx.sigmoid_attention, dense, bias=heads[0], alibi_slopes=heads[1], window=(5, 3))
    _differentiate(attnx.softmax_attention, dense, sink=heads[0], alibi_slopes=heads[1], is_causal=True)
    _differentiate(attnx.sigmoid_attention_varlen, packed, *offsets, 30, 30, bias="row", window=(5, 3))
    _differentiate(attnx.softmax_attention_varlen, packed, *offsets, 30, 30, sink=heads[0])
    used = {"seqused_k": torch.tensor([30, 7], dtype=torch.int32), "leftpad_k": torch.tensor([0, 3], dtype=torch.int32)}
    _differentiate(attnx.sigmoid_attention, dense, **used, is_causal=True, position_offset=3)
    bounds = torch.randint(0, 30, (1, 4, 20, 2), dtype=torch.int32)
    _differentiate(attnx.softmax_attention, dense, **used, window=(9, None), row_bounds=bounds)
    for sharpen in (None, 3):
        _differentiate(attnx.softplus_attention, dense, sharpen=sharpen, **used, is_causal=True)
        _differentiate(attnx.softplus_attention_varlen, packed, *offsets, 30, 30, sharpen=sharpen, window=(5, 3))
    index = attnx.log_distance_buckets(20, 30, span=4, max_distance=16)
    _differentiate(
        lambda q, k, v, c2p, p2c: attnx.disentangled_attention(q, k, v, index, pos_key=c2p, pos_query=p2c),
        [*dense, _draw(4, 8, 16, dtype=dtype), _draw(4, 8, 16, dtype=dtype)],
    )
    _differentiate(lambda q, k, v, table: attnx.relative_bias_attention(q, k, v, table), [*dense, torch.randn(4, 16)])
    fewer = torch.tensor([0, 20, 20, 45], dtype=torch.int32)
    _differentiate(attnx.softmax_attention_varlen, packed, fewer, offsets[1], 30, 30, has_padding=True)
    inputs, tangents = tuple(dense), tuple(x.flip(2) for x in dense)
    for function in (attnx.softmax_attention, attnx.sigmoid_attention):
        torch.func.jvp(partial(function, is_causal=True), inputs, tangents)
        torch.func.jvp(lambda q, f=function: f(q, *inputs[1:], window=(5, 3)), inputs[:1], tangents[:1])


def _packed(dtype: torch.dtype) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    inputs = [_draw(150, 4, 16, dtype=dtype), _draw(200, 2, 16, dtype=dtype), _draw(200, 2, 8, dtype=dtype)]
    return inputs, (torch.tensor([0, 20, 150], dtype=torch.int32), torch.tensor([0, 70, 200], dtype=torch.int32))


def _blocks(dtype: torch.dtype) -> None:
    inputs = [_draw(2, 4, 130, 16, dtype=dtype), _draw(2, 2, 200, 16, dtype=dtype), _draw(2, 2, 200, 8, dtype=dtype)]
    mask = attnx.BlockMask.from_dense(torch.rand(1, 4, 3, 4) < 0.6)
    block_bias = torch.randn(*mask.kv_indices.shape)
    _differentiate(attnx.block_sparse_attention, inputs, mask, block_bias=block_bias, sink=torch.rand(4))
    used = torch.tensor([150, 65], dtype=torch.int32)
    _differentiate(attnx.block_sparse_attention, inputs, mask, score="sigmoid", is_causal=True, seqused_k=used)
    for options in ({"mode": "bernoulli", "importance": True}, {"mode": "topm"}):
        _differentiate(attnx.probabilistic_attention, inputs, density=0.6, seed=3, offset=1, **options)
    _differentiate(attnx.probabilistic_attention, inputs, density=0.6, seed=3, offset=1, seqused_k=used)
    packed, offsets = _packed(dtype)
    wide = attnx.BlockMask(mask.kv_num_blocks, mask.kv_indices, lengths=(130, 200))
    _differentiate(attnx.block_sparse_attention_varlen, packed, *offsets, 130, 200, wide, block_bias=block_bias)
    _differentiate(attnx.probabilistic_attention_varlen, packed, *offsets, 130, 130, seed=3, offset=1)
    attnx.probabilistic_block_mask(2, 4, 130, 200, density=0.6, seed=3, offset=1)


def _delta_rule(dtype: torch.dtype) -> None:
    query, key, value = (
        _draw(2, 2, 20, 16, dtype=dtype),
        _draw(2, 2, 20, 16, dtype=dtype),
        _draw(2, 4, 20, 8, dtype=dtype),
    )
    gates = [-torch.rand(2, 4, 20), torch.rand(2, 4, 20)]
    _differentiate(attnx.gated_delta_rule, [query, key / 4, value, *gates])
    state = torch.randn(2, 4, 16, 8)
    _differentiate(
        lambda q, k, v, g, b, s: attnx.gated_delta_rule(q, k, v, g, b, initial_state=s, return_state=True),
        [query[:, :, :3], key[:, :, :3], value[:, :, :3], *(x[:, :, :3] for x in gates), state],
    )
    _differentiate(
        lambda q, k, v, g, b, c: attnx.gated_delta_rule(q, k, v, g, b, carry=c, return_state=True),
        [query, key / 4, value, *gates, torch.rand(2, 4, 1)],
    )


def _linear(dtype: torch.dtype) -> None:
    inputs = [_draw(2, 4, 20, 6, dtype=dtype), _draw(2, 2, 20, 6, dtype=dtype), _draw(2, 2, 20, 8, dtype=dtype)]
    _differentiate(attnx.linear_attention, inputs)
    _differentiate(attnx.linear_attention, inputs, is_causal=False, feature_map="elu", return_state=True)
    _differentiate(
        lambda q, k, v, s: attnx.linear_attention(q, k, v, initial_state=s), [*inputs, torch.rand(2, 2, 28, 9)]
    )


def _weights(dtype: torch.dtype) -> None:
    inputs = [_draw(2, 4, 20, 16, dtype=dtype), _draw(2, 2, 30, 16, dtype=dtype)]
    _differentiate(attnx.attention_key_weights, inputs, row_weights=torch.rand(2, 1, 20), is_causal=True)
    _differentiate(attnx.attention_key_weights, inputs, score="sigmoid", window=(5, 3))
    _differentiate(attnx.attention_row_weights, inputs, rows=range(10, 20), is_causal=True)
    attnx.attention_max_logits(*inputs, window=(5, 3))
    mask, share = torch.rand(1, 4, 20, 30) < 0.9, torch.rand(2, 1, 30)
    attnx.pointer_argmax(*inputs, is_causal=True)
    attnx.pointer_sample(*inputs, seed=3, offset=1, softcap=5.0, attn_mask=mask, key_bias=share, key_mask=share)


def _maps(dtype: torch.dtype) -> None:
    inputs = [_draw(2, 4, 130, 16, dtype=dtype), _draw(2, 2, 200, 16, dtype=dtype), _draw(2, 2, 200, 8, dtype=dtype)]
    packed, offsets = _packed(dtype)
    shares = {"critical": 0.3, "negligible": 0.3}
    _differentiate(attnx.sparse_linear_attention, inputs, **shares, is_causal=True, smooth_k=True)
    used = torch.tensor([150, 65], dtype=torch.int32)
    _differentiate(attnx.sparse_linear_attention, inputs, **shares, seqused_k=used)
    _differentiate(attnx.sparse_linear_attention_varlen, packed, *offsets, 130, 130, **shares, linear_scope="all")
    torch.ops.attnx.sparse_linear_labels(torch.randn(2, 4, 3, 4), 130, 200, 64, 64, 0.3, 0.3, "floor", True, 70)


def _routing(dtype: torch.dtype) -> None:
    inputs = [_draw(2, 4, 40, 16, dtype=dtype), _draw(2, 2, 50, 16, dtype=dtype), _draw(2, 2, 50, 8, dtype=dtype)]
    centroids, counts = torch.randn(4, 3, 16), torch.ones(4, 3)
    memory = _draw(2, 5, 16, dtype=dtype), _draw(2, 5, 8, dtype=dtype)
    _differentiate(attnx.routing_attention, inputs, centroids, cluster_size=12, memory_kv=memory)
    _differentiate(attnx.routing_attention, inputs, centroids, routing="argmax", score="sigmoid")
    attnx.update_centroids_(centroids.clone(), counts, inputs[0], inputs[1])
    used = torch.tensor([31, 50], dtype=torch.int32)
    torch.ops.attnx.nearest_centroids(inputs[0], centroids, used - 20, used - 30)
    _differentiate(attnx.routing_attention, inputs, centroids, cluster_size=12, seqused_k=used, is_causal=True)
    packed, offsets = _packed(dtype)
    _differentiate(attnx.routing_attention_varlen, packed, *offsets, 130, 130, centroids, cluster_size=12)
    torch.ops.attnx.move_centroids_in_backward(*inputs[:2], centroids, counts, *[None] * 4, 0.9, "")
    torch.ops.attnx.move_average_in_backward(inputs[0], torch.zeros(4), torch.rand(4), 0.9)


def _pooling(dtype: torch.dtype) -> None:
    rows = _draw(2, 4, 40, 16, dtype=dtype)
    ranges = torch.tensor([[[0, 3], [3, 3], [2, 40]]], dtype=torch.int32)
    torch.ops.attnx.range_means(rows, ranges)
    torch.ops.attnx.block_means(rows, 16)
    torch.ops.attnx.block_statistics(rows, 16)


def _staircase(dtype: torch.dtype) -> None:
    cache = attnx.StaircaseCache(2, 2, 32, 300, window=32, group=32, residual=5, dtype=dtype)
    key, value = _draw(2, 2, 120, 32, dtype=dtype), _draw(2, 2, 120, 32, dtype=dtype)
    cache.append(key, value)
    cache.append(key[:, :, :7], value[:, :, :7], counts=torch.tensor([3, 7]))
    cache.crop(torch.tensor([100, 110]))
    cache.reorder(torch.tensor([1, 0]))
    cache.attend(_draw(2, 4, 3, 32, dtype=dtype))
    cache.attend(_draw(2, 4, 3, 32, dtype=dtype), score="sigmoid", bias=torch.rand(4))
    cache.dequantize()


@cache
def valid_calls() -> dict[str, list[Arguments]]:
    """Every operator has some arguments here that it takes, by name."""
    torch.manual_seed(0)
    with RecordedCalls() as recorded:
        for dtype in (torch.float32, torch.bfloat16):
            for record in (_pointwise, _blocks, _delta_rule, _linear, _weights, _maps, _routing, _pooling, _staircase):
                record(dtype)
    calls: dict[str, list[Arguments]] = {name: [] for name in NAMES}
    for operator, args, _ in recorded.seen:
        values = signature(operator._opname).bind(args)
        calls[operator._opname].append({n: x.detach() if isinstance(x, Tensor) else x for n, x in values.items()})
    missing = [name for name in NAMES if not calls[name]]
    assert not missing, f"operators without a valid call: {missing}"
    return calls
