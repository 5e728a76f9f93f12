"""How a sequence is cut into shards, one for each process."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch import distributed as dist

from attnx import _arguments
from attnx.distributed import _group
from attnx.distributed._group import GroupLike

__all__ = ["Layout", "gather_sequence", "sequence_positions", "shard_sequence"]

Layout: TypeAlias = Literal["contiguous", "zigzag"]


def chunks_of(layout: Layout, rank: int, size: int) -> tuple[int, ...]:
    """Which chunks of the sequence a process has, of as many as all have together."""
    if layout == "contiguous":
        return (rank,)
    return rank, 2 * size - 1 - rank


def check_layout(layout: object) -> None:
    if layout not in get_args(Layout):
        _arguments.refuse("layout", '"contiguous" or "zigzag"', layout)


def shard_sequence(x: Tensor, dim: int = 2, *, group: GroupLike = None, layout: Layout = "contiguous") -> Tensor:
    """The part of a sequence that this process works on.

    ``"contiguous"`` cuts the sequence into one chunk for each process, in the order of their ranks. ``"zigzag"`` cuts
    it into twice as many, and of n processes the one of rank r has the chunks r and 2 n - 1 - r: each has early tokens
    and late ones, so that all have as many pairs in causal attention, in which late tokens see more keys.
    ``torch.distributed.tensor.experimental.context_parallel`` balances its load by the same chunks.

    Args:
        x: any shape and dtype; the whole, which every process has.
        dim: the dimension that counts tokens. Its size is a multiple of the chunks.
        group: the processes that share the sequence: a ProcessGroup, a DeviceMesh of one dimension, or None for all.
        layout: how it is cut.

    Returns:
        x, with its size in ``dim`` divided by the number of processes.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what came.

    Source: Brandon et al., "Striped Attention: Faster Ring Attention for Causal Transformers", arXiv 2311.09431, which
    balances by stripes of single tokens what zigzag does by chunks.
    """
    _arguments.tensors(x=x)
    rows = sequence_positions(x.shape[dimension(dim, x)], group=group, layout=layout, device=x.device)
    return x.index_select(dim, rows)


def sequence_positions(
    length: int, *, group: GroupLike = None, layout: Layout = "contiguous", device: torch.device | str | None = None
) -> Tensor:
    """Where the tokens of this process stand in the whole sequence, as rotary embeddings need it.

    Args:
        length: that of the whole sequence, a multiple of the number of chunks.
        group: as in :func:`shard_sequence`.
        layout: as in :func:`shard_sequence`.
        device: where the result lies.

    Returns:
        (length / processes,) int64.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what came.
    """
    processes = _group.resolve(group)
    return positions(length, processes.rank, processes.size, layout, device)


@torch.no_grad()
def gather_sequence(x: Tensor, dim: int = 2, *, group: GroupLike = None, layout: Layout = "contiguous") -> Tensor:
    """The whole sequence on every process, from the shards of all: the inverse of :func:`shard_sequence`.

    Args:
        x: the shard, of one shape and dtype on all processes, without a gradient.
        dim: the dimension that counts tokens.
        group: as in :func:`shard_sequence`.
        layout: as in :func:`shard_sequence`.

    Returns:
        x, with its size in ``dim`` times the number of processes.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what came.
    """
    _group.expect_shards(x=x)
    dim = dimension(dim, x)
    if x.requires_grad:
        raise RuntimeError("x: expected a tensor that needs no gradient, as none goes back to the shards; detach it")
    processes = _group.resolve(group)
    length = x.shape[dim] * processes.size
    rows = [positions(length, rank, processes.size, layout, x.device) for rank in range(processes.size)]
    shards = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in rows]
    dist.all_gather(shards, x.contiguous(), group=processes.processes)
    return torch.cat(shards, dim).index_select(dim, torch.cat(rows).argsort())


def positions(length: int, rank: int, size: int, layout: Layout, device: torch.device | str | None = None) -> Tensor:
    check_layout(layout)
    chunks = chunks_of(layout, rank, size)
    number = len(chunks) * size
    length = _arguments.integer("length", length, 0)
    if length % number:
        raise RuntimeError(
            f"length: expected a multiple of {number}, as layout={layout!r} cuts it for {size} processes, got {length}"
        )
    each = length // number
    return torch.cat([torch.arange(chunk * each, (chunk + 1) * each, device=device) for chunk in chunks])


def dimension(dim: int, x: Tensor) -> int:
    _arguments.integer("dim", dim, -x.dim(), x.dim() - 1, f"a dimension of a tensor of {x.dim()}")
    return dim % x.dim()
