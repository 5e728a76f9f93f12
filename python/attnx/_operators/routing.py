"""What is special to the routing operators: shapes of lists, and centroids that move in a backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnx import _capability
from attnx._operators.schema import Arguments, sum_dtype

LENGTHS = "Tensor? seqused_q, Tensor? leftpad_q, Tensor? seqused_k, Tensor? leftpad_k"

# Shapes -------------------------------------------------------------------------------------------------------------


def logsumexp(arguments: Arguments) -> Tensor:
    query = arguments["query"]
    return query.new_empty(arguments["query_indices"].shape, dtype=sum_dtype(query))


def memory_key(arguments: Arguments) -> Tensor:
    return _memory(arguments, arguments["key"])


def memory_value(arguments: Arguments) -> Tensor:
    return _memory(arguments, arguments["value"])


def _memory(arguments: Arguments, rows: Tensor) -> Tensor:
    memory = arguments["memory_key"]
    return rows.new_empty(rows.shape[1], 0 if memory is None else memory.shape[1], rows.shape[-1])


def routes(
    query: Tensor,
    key: Tensor,
    centroids: Tensor,
    cluster_size_q: int,
    cluster_size_k: int,
    routing: str,
    shared_qk: bool,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    **others: Any,
) -> tuple[Tensor, ...]:
    (heads, clusters), packed = centroids.shape[:2], cu_seqlens_q is not None
    batch, sequences = (1, cu_seqlens_q.shape[0] - 1) if cu_seqlens_q is not None else (query.shape[0], 1)

    def lists(rows: Tensor, size: int, longest: int) -> tuple[Tensor, Tensor]:
        length = rows.shape[0 if packed else 2]
        if packed:
            size = sequences * torch.sym_min(size, longest)
        slots = clusters * torch.sym_min(size, length) if routing == "topk" else length
        ends = sequences * clusters + 1
        indices, offsets = (query.new_empty((batch, heads, n), dtype=torch.int32) for n in (slots, ends))
        return indices, offsets

    of_queries = lists(query, cluster_size_q, max_seqlen_q)
    if shared_qk:
        return *of_queries, *(query.new_empty(0, dtype=torch.int32) for _ in range(2))
    return *of_queries, *lists(key, cluster_size_k, max_seqlen_k)


def nearest(rows: Tensor, centroids: Tensor, **lengths: Any) -> Tensor:
    return rows.new_empty((rows.shape[0], centroids.shape[0], rows.shape[2]), dtype=torch.int32)


def sums(centroids: Tensor, **others: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(centroids), centroids.new_empty(centroids.shape[:2])


# Refusals -----------------------------------------------------------------------------------------------------------


def refusal(name: str, arguments: Arguments) -> str:
    """The operators around the attention need what it needs of a backend."""
    rows = next(iter(arguments.values()))
    lengths = ("seqused_k", "leftpad_k", "cu_seqlens_q", "has_padding")
    given = {name: x for name, x in arguments.items() if name in lengths}
    return _capability.refusal("routing_attention", {"query": rows, "key": rows, "value": rows} | given)


# Centroids that move ------------------------------------------------------------------------------------------------


@torch.no_grad()
def update(
    centroids: Tensor,
    counts: Tensor,
    query: Tensor,
    key: Tensor,
    used: Sequence[Tensor | None],
    decay: float,
    group: str,
) -> None:
    """Moves centroids by what the processes of the group have together, or this process alone without a group."""
    sums, members = torch.ops.attnx.centroid_sums(query, key, centroids, *used)
    if group:
        collectives = torch.ops._c10d_functional
        flat = torch.cat((sums.flatten(), members.flatten()))
        flat = collectives.wait_tensor(collectives.all_reduce(flat, "sum", group))
        sums, members = flat[: sums.numel()].view_as(sums), flat[sums.numel() :].view_as(members)
    torch.ops.attnx.update_centroids_(centroids, counts, sums, members, decay)


def save_what_moves(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, *ctx.others = inputs  # saved tensors must not change, and another backward may move the centroids
    ctx.save_for_backward(query, key)


def move(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    query, key = ctx.saved_tensors
    centroids, counts, *used, decay, group = ctx.others
    update(centroids, counts, query.detach(), key.detach(), used, decay, group)
    return grad, *(None for _ in range(1 + len(ctx.others)))


def same_query(query: Tensor, **others: Any) -> Tensor:
    return torch.empty_like(query)


def copy_query(query: Tensor, *others: Any) -> Tensor:
    return query.clone()
