"""Attention whose keys travel around a ring of processes."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor
from typing_extensions import TypedDict, Unpack

from attnx import _arguments
from attnx._operators.schema import signature, sum_dtype
from attnx._scores import SigmoidBias, resolve_score
from attnx._terms import resolve_terms
from attnx.distributed import _group, _inputs, sequence
from attnx.distributed._group import Group, GroupLike
from attnx.distributed._parts import Band, Part, Shard, parts
from attnx.distributed._ring import Plan, RingAttention
from attnx.distributed.sequence import Layout
from attnx.functional import Window

__all__ = ["ring_sigmoid_attention", "ring_softmax_attention"]


class RingOptions(TypedDict, total=False):
    """These are for type checkers, which tell by ``return_logsumexp`` what comes back."""

    group: GroupLike
    layout: Layout
    scale: float | Tensor | None
    is_causal: bool
    window: Window
    position_offset: int
    alibi_slopes: Tensor | None
    sink: Tensor | None
    softcap: float | None
    key_bias: Tensor | None
    key_mask: Tensor | None


@overload
def ring_softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    return_logsumexp: Literal[False] = False,
    **options: Unpack[RingOptions],
) -> Tensor: ...
@overload
def ring_softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, *, return_logsumexp: Literal[True], **options: Unpack[RingOptions]
) -> tuple[Tensor, Tensor]: ...
@overload
def ring_softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, *, return_logsumexp: bool, **options: Unpack[RingOptions]
) -> Tensor | tuple[Tensor, Tensor]: ...
def ring_softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: GroupLike = None,
    layout: Layout = "contiguous",
    scale: float | Tensor | None = None,
    is_causal: bool = False,
    window: Window = None,
    position_offset: int = 0,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    softcap: float | None = None,
    key_bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    return_logsumexp: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Softmax attention over a sequence of which each process of a group has a shard.

    The keys and values travel from process to process. What each shard of them gives is merged by its logsumexp
    (:func:`attnx.merge_attention`). While a process computes with one shard, the next one arrives. The backward sends
    keys and values around once more, and their gradients with them. Beside its own a process has at most two shards at
    a time. Those that no query of any process sees, as under a window, are not sent for.

    Args:
        query: (batch, heads, length_q, head_dim): the shard of this process, as :func:`shard_sequence` cuts it.
        key: (batch, kv_heads, length_k, head_dim), likewise; heads is a multiple of kv_heads.
        value: (batch, kv_heads, length_k, value_dim), likewise. Shapes and dtypes are the same on all processes; with
            ``ATTNX_DEBUG=1`` in the environment this is checked, and without it others wait for what never comes.
        group: the processes that share the sequence: a ProcessGroup, a DeviceMesh of one dimension, or None for all.
            All of them make the same calls in the same order.
        layout: how the sequence is cut. In a causal call all processes have as many pairs of queries and keys with
            ``"zigzag"``, for which length_q and length_k are even.
        key_bias: (batch or 1, heads or 1, length_k), the shard that belongs to key. It travels with the keys.
        key_mask: likewise.
        sink: (heads,) or (), as in :func:`attnx.softmax_attention`, but not +inf.

    The other arguments are those of :func:`attnx.softmax_attention`; what they say of positions, as ``is_causal``,
    ``window`` and ``alibi_slopes`` do, is of the whole sequence. The gradients of ``sink`` and of a tensor as ``scale``
    are those of the rows of this process.

    Returns:
        (batch, heads, length_q, value_dim) in the dtype of query: the shard of the output; with ``return_logsumexp``
        also (batch, heads, length_q), float32 (float64 for float64). Both are differentiable, once.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what came.
        NotImplementedError: no kernel for these arguments on this device; the message names what is missing.

    Source: Liu et al., "Ring Attention with Blockwise Transformers for Near-Infinite Context", arXiv 2310.01889.
    """
    output, logsumexp = _attend(
        "softmax_attention",
        query,
        key,
        value,
        group=group,
        layout=layout,
        scale=scale,
        is_causal=is_causal,
        window=window,
        position_offset=position_offset,
        softcap=softcap,
        parameters={"alibi_slopes": alibi_slopes, "sink": sink},
        of_keys={"key_bias": key_bias, "key_mask": key_mask},
    )
    return (output, logsumexp) if return_logsumexp else output


def ring_sigmoid_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: GroupLike = None,
    layout: Layout = "contiguous",
    bias: SigmoidBias = None,
    scale: float | Tensor | None = None,
    is_causal: bool = False,
    window: Window = None,
    position_offset: int = 0,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    key_bias: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    r"""Sigmoid attention over a sequence of which each process of a group has a shard.

    It is :func:`ring_softmax_attention` without a normalisation, so that the results of shards add.

    Args:
        query: (batch, heads, length_q, head_dim): the shard of this process, as :func:`shard_sequence` cuts it.
        key: (batch, kv_heads, length_k, head_dim), likewise.
        value: (batch, kv_heads, length_k, value_dim), likewise.
        group: as in :func:`ring_softmax_attention`.
        layout: as in :func:`ring_softmax_attention`.
        bias: as in :func:`attnx.sigmoid_attention`. None: -log of the length of the whole sequence of keys; ``"row"``:
            -log of how many keys of the whole sequence the row sees. The gradient of a tensor is that of the rows of
            this process.

    The other arguments are those of :func:`ring_softmax_attention`.

    Returns:
        (batch, heads, length_q, value_dim) in the dtype of query: the shard of the output, differentiable once.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what came.
        NotImplementedError: no kernel for these arguments on this device; the message names what is missing.

    Sources: Ramapuram et al., "Theory, Analysis, and Best Practices for Sigmoid Self-Attention", arXiv 2409.04431; the
    ring is that of Liu et al., arXiv 2310.01889.
    """
    score = resolve_score("sigmoid", bias, tensor_bias=True)
    output, _ = _attend(
        "sigmoid_attention",
        query,
        key,
        value,
        group=group,
        layout=layout,
        scale=scale,
        is_causal=is_causal,
        window=window,
        position_offset=position_offset,
        softcap=softcap,
        parameters={"alibi_slopes": alibi_slopes, "bias": score.bias},
        of_keys={"key_bias": key_bias, "key_mask": key_mask},
        bias_rule=score.bias_rule,
        bias_value=score.bias_value,
    )
    return output


# These are the operators' arguments for what resolve_terms returns.
_TERMS = ("attn_mask", "distance_bias", "row_bounds", "softcap", "key_bias", "key_mask", "dropout_p", "seed", "offset")


@torch.compiler.disable(reason="what is sent to single processes belongs in no graph")
def _attend(
    operator: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: GroupLike,
    layout: Layout,
    scale: float | Tensor | None,
    is_causal: bool,
    window: Window,
    position_offset: int,
    softcap: float | None,
    parameters: dict[str, Tensor | None],
    of_keys: dict[str, Tensor | None],
    bias_rule: str = "none",
    bias_value: float = 0.0,
) -> tuple[Tensor, Tensor]:
    _group.expect_shards(query=query, key=key, value=value)
    _arguments.optional_tensors(**parameters, **of_keys)
    sequence.check_layout(layout)
    processes = _group.resolve(group)
    left, right = _arguments.window(window)
    if _arguments.flag("is_causal", is_causal):
        right = 0
    _inputs.check_shapes(query, key, value, layout)
    for name, x in of_keys.items():
        if x is not None and (x.dim() != 3 or x.shape[2] != key.shape[2]):
            _arguments.refuse(name, f"({query.shape[0]} or 1, {query.shape[1]} or 1, {key.shape[2]})", x)
    if parameters.get("sink") is not None:
        _check_sink(parameters["sink"], query)
    query, key, value = _inputs.autocast(query, key, value)
    query, scale = _arguments.with_scale(query, scale)
    pairs, terms = resolve_terms(
        operator,
        query,
        key,
        value,
        softcap=softcap,
        key_bias=of_keys["key_bias"],
        key_mask=of_keys["key_mask"],
    )
    named_terms = dict(zip(_TERMS, (*pairs, *terms), strict=True))

    lengths = [x.shape[2] * processes.size for x in (query, key)]
    position_offset = _arguments.integer("position_offset", position_offset)
    shift = lengths[1] - lengths[0] + position_offset
    band = Band(left, right, shift, parameters["alibi_slopes"] is not None)
    row_bias = None
    if bias_rule == "row":
        positions = sequence.positions(lengths[0], processes.rank, processes.size, layout, query.device)
        row_bias = -_seen(positions + shift, band, lengths[1]).to(sum_dtype(query)).log()
    elif bias_rule == "length":
        bias_value = -math.log(max(lengths[1], 1))

    of = signature(operator)
    constants = dict.fromkeys(of.arguments) | named_terms | {"scale": scale, "is_causal": False}
    constants |= {"bias_rule": "none", "bias_value": bias_value}
    steps = _steps(processes, layout, query.shape[2], key.shape[2], band)
    travelling = {"key": key, "value": value, "key_bias": named_terms["key_bias"]}
    travelling["key_mask"] = named_terms["key_mask"]
    plan = Plan(operator, processes, constants, steps, band, row_bias, tuple(parameters), tuple(travelling))
    shapes = {name: tuple(x.shape) for name, x in travelling.items() if x is not None}
    _group.check_alike("shapes, dtype and options", (shapes, query.shape[2], query.dtype, layout, band), processes)
    plan.check(position_offset, query, *parameters.values(), *travelling.values())
    return RingAttention.apply(plan, query, *parameters.values(), *travelling.values())


def _check_sink(sink: Any, query: Tensor) -> None:
    """Operators never see the sink: it is where merging begins."""
    dtype, heads = sum_dtype(query), query.shape[1]
    if sink.dtype != dtype or sink.shape not in ((), (heads,)) or sink.device != query.device:
        raise RuntimeError(
            f"sink: expected {dtype} of shape () or ({heads},) on {query.device}, got {sink.dtype} of shape "
            f"{tuple(sink.shape)} on {sink.device}"
        )


def _steps(processes: Group, layout: Layout, length_q: int, length_k: int, band: Band) -> list[list[Part]]:
    """The calls of this process, up to the last step at which some process has any."""

    def at(rank: int, step: int) -> list[Part]:
        of_queries, of_keys = (
            sequence.chunks_of(layout, process % processes.size, processes.size) for process in (rank, rank - step)
        )
        return parts(Shard(of_queries, length_q // len(of_queries)), Shard(of_keys, length_k // len(of_keys)), band)

    used = [step for step in range(processes.size) if any(at(rank, step) for rank in range(processes.size))]
    return [at(processes.rank, step) for step in range(max(used, default=0) + 1)]


def _seen(places: Tensor, band: Band, length_k: int) -> Tensor:
    """How many keys the queries at these places see, or 1 where they see none."""
    first = (places - band.left).clamp(min=0) if band.left >= 0 else torch.zeros_like(places)
    last = (places + band.right).clamp(max=length_k - 1) if band.right >= 0 else torch.full_like(places, length_k - 1)
    return (last - first + 1).clamp(min=1)
