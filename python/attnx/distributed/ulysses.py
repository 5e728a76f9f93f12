"""Attention for which processes exchange heads for the sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from attnx import _arguments, _shards
from attnx.distributed import _group, sequence
from attnx.distributed._group import Group, GroupLike
from attnx.distributed.sequence import Layout

__all__ = ["local_heads", "ulysses_attention"]

Results = TypeVar("Results")


def ulysses_attention(
    attention: Callable[..., Results],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: GroupLike = None,
    layout: Layout = "contiguous",
    **options: Any,
) -> Results:
    """Any attention over a sequence of which each process of a group has a shard.

    An all-to-all gives each process the whole sequence of some heads, ``attention`` works on these as in one process,
    and another all-to-all takes what it returns back to shards. It is differentiable as ``attention`` is.

    Args:
        attention: a function of query, key and value that treats heads alike and apart, as all of attnx's do. It
            returns a tensor of shape (batch, heads, length_q, ...), or several of them.
        query: (batch, heads, length_q, head_dim): the shard of this process, as :func:`shard_sequence` cuts it. heads
            is a multiple of the number of processes.
        key: (batch, kv_heads, length_k, head_dim), likewise. Where kv_heads divides the number of processes instead,
            each head goes to several of them.
        value: (batch, kv_heads, length_k, value_dim), likewise.
        group: the processes that share the sequence: a ProcessGroup, a DeviceMesh of one dimension, or None for all.
        layout: how the sequence is cut. ``attention`` sees it whole and in order either way.
        options: keyword arguments of ``attention``. They are about the whole sequence and the heads of this process
            (:func:`local_heads`). A random attention counts heads from 0 in each process, so that the same seed has
            all processes draw the same.

    Returns:
        What ``attention`` does, each tensor (batch, heads, length_q, ...) of the shard.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what came.

    Source: Jacobs et al., "DeepSpeed Ulysses: System Optimizations for Enabling Training of Extreme Long Sequence
    Transformer Models", arXiv 2309.14509.
    """
    _group.expect_shards(query=query, key=key, value=value)
    sequence.check_layout(layout)
    processes = _group.resolve(group)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 4:
            _arguments.refuse(name, "(batch, heads, length, head_dim)", x)
        if layout == "zigzag" and x.shape[2] % 2:
            _arguments.refuse(name, 'two chunks of one length, as layout="zigzag" has them', x)
    _check_heads("query", query.shape[1], processes)
    if value.shape[:3] != key.shape[:3]:
        _arguments.refuse("value", f"({', '.join(map(str, key.shape[:3]))}, value_dim)", value)
    if key.shape[1] and processes.size % key.shape[1] == 0:
        repeats = processes.size // key.shape[1]
        key, value = (x.repeat_interleave(repeats, 1) if repeats > 1 else x for x in (key, value))
    _check_heads("key", key.shape[1], processes)
    _group.check_alike(
        "shapes, dtype and layout", (*(x.shape for x in (query, key, value)), query.dtype, layout), processes
    )

    def whole(x: Tensor) -> Tensor:
        x = _exchange(x, processes, 1, 2)
        return x.index_select(2, _order(x.shape[2], processes, layout, x.device).argsort()) if layout == "zigzag" else x

    def shard(x: Tensor) -> Tensor:
        if not isinstance(x, Tensor) or x.shape[:3] != rows:
            _arguments.refuse("attention", f"a function that returns tensors of shape {tuple(rows)} and more", x)
        if layout == "zigzag":
            x = x.index_select(2, _order(x.shape[2], processes, layout, x.device))
        return _exchange(x, processes, 2, 1)

    query, key, value = whole(query), whole(key), whole(value)
    rows = query.shape[:3]
    with _shards.whole():
        results: Any = attention(query, key, value, **options)
    shards: Any = tuple(map(shard, results)) if isinstance(results, tuple) else shard(results)
    return shards


def local_heads(x: Tensor, dim: int = 0, *, group: GroupLike = None) -> Tensor:
    """The heads that are this process's in :func:`ulysses_attention`, of a tensor that has something for each head.

    Args:
        x: any shape and dtype, as slopes, sinks, biases and centroids.
        dim: the dimension that counts heads. Its size is a multiple of the number of processes.
        group: as in :func:`ulysses_attention`.

    Returns:
        x, with its size in ``dim`` divided by the number of processes; a view, and differentiable.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what came.
    """
    _arguments.tensors(x=x)
    dim = sequence.dimension(dim, x)
    processes = _group.resolve(group)
    _check_heads("x", x.shape[dim], processes)
    return x.chunk(processes.size, dim)[processes.rank]


def _check_heads(name: str, heads: int, processes: Group) -> None:
    if heads % processes.size:
        what = ", or divides that" if name == "key" else ""
        raise RuntimeError(
            f"{name}: expected heads in a multiple of the number of processes, {processes.size}{what}, got {heads}"
        )


def _order(length: int, processes: Group, layout: Layout, device: torch.device) -> Tensor:
    """Where the tokens of the shards, end to end, stand in the sequence."""
    shards = (sequence.positions(length, rank, processes.size, layout, device) for rank in range(processes.size))
    return torch.cat(tuple(shards))


class _Exchange(torch.autograd.Function):
    """Each process gives every other its part of one dimension, and puts what it gets end to end in another."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, processes: Group, split: int, join: int) -> Tensor:
        ctx.back = (processes, join, split)
        given = x.unflatten(split, (processes.size, -1)).movedim(split, 0).contiguous()
        taken = torch.empty_like(given)
        dist.all_to_all_single(taken, given, group=processes.processes)
        return taken.movedim(0, join).flatten(join, join + 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _Exchange.apply(grad, *ctx.back), None, None, None


@torch.compiler.disable(reason="autograd.Function around a collective belongs in no graph")
def _exchange(x: Tensor, processes: Group, split: int, join: int) -> Tensor:
    return _Exchange.apply(x, processes, split, join)
