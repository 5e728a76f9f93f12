"""Attention over keys of which each process has some."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist

from attnx.distributed import _group
from attnx.distributed._group import GroupLike
from attnx.merging import merge_attention

__all__ = ["all_merge_attention"]


@torch.no_grad()
def all_merge_attention(output: Tensor, logsumexp: Tensor, *, group: GroupLike = None) -> tuple[Tensor, Tensor]:
    """Softmax attention over the keys of all processes, on each of them, from the results over the keys of each.

    All have the same queries and other keys, as where a cache is too large for one of them: each attends over its own
    part (:class:`attnx.StaircaseCache`, or a plain cache) and asks for the logsumexp. One all-gather of what a few rows
    give follows. Results of sigmoid attention add instead (``torch.distributed.all_reduce``), with a bias that is given
    as a number, as the default one counts the keys of a process alone.

    Args:
        output: (batch, heads, length, value_dim), of one shape and dtype on all processes, without a gradient.
        logsumexp: (batch, heads, length), float32 (float64 for float64), likewise; -inf where a row sees no key of
            this process.
        group: the processes that have the keys: a ProcessGroup, a DeviceMesh of one dimension, or None for all.

    Returns:
        What :func:`attnx.merge_attention` does, the same on all processes.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what came.
    """
    _group.expect_shards(output=output, logsumexp=logsumexp)
    for name, x in (("output", output), ("logsumexp", logsumexp)):
        if x.requires_grad:
            raise RuntimeError(f"{name}: expected a tensor that needs no gradient, as none goes back; detach it")
    merge_attention([output], [logsumexp])  # refuses what does not fit, before anything is sent
    processes = _group.resolve(group)
    rows = torch.cat([output.to(logsumexp.dtype), logsumexp[..., None]], -1)
    of_all = [torch.empty_like(rows) for _ in range(processes.size)]
    dist.all_gather(of_all, rows, group=processes.processes)
    merged, total = merge_attention([x[..., :-1] for x in of_all], [x[..., -1] for x in of_all])
    return merged.to(output.dtype), total
