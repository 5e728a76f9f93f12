"""What torch must know of the routing operators: shapes, gradients, batching, autocast, refusals."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnx import _capability, _operators

NAME = "routing_attention"
UPDATE = "update_centroids_"
MOVE = "move_centroids_in_backward"


def _fake_attention(query: Tensor, key: Tensor, value: Tensor, query_indices: Tensor, *args: Any) -> Any:
    _capability.check_placement({"query": query, "key": key, "value": value, "query_indices": query_indices})
    logsumexp = query.new_empty(query_indices.shape, dtype=_operators._sum_type(query))
    return _operators._empty_rows(query, value.shape[-1]), logsumexp


def _fake_backward(
    grad_output: Tensor,
    grad_logsumexp: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    query_indices: Tensor,
    query_offsets: Tensor,
    key_indices: Tensor,
    key_offsets: Tensor,
    memory_key: Tensor | None,
    memory_value: Tensor | None,
    *args: Any,
) -> tuple[Tensor, ...]:
    memory = 0 if memory_key is None else memory_key.shape[1]
    return (
        *(_operators._empty_rows(x, x.shape[-1]) for x in (query, key, value)),
        query.new_empty(key.shape[1], memory, key.shape[-1]),
        query.new_empty(key.shape[1], memory, value.shape[-1]),
    )


def _fake_route(
    query: Tensor,
    key: Tensor,
    centroids: Tensor,
    cluster_size_q: int,
    cluster_size_k: int,
    routing: str,
    shared_qk: bool,
) -> tuple[Tensor, ...]:
    batch, heads, clusters = query.shape[0], centroids.shape[0], centroids.shape[1]

    def lists(length: int, size: int) -> tuple[Tensor, Tensor]:
        slots = clusters * torch.sym_min(size, length) if routing == "topk" else length
        shapes = (batch, heads, slots), (batch, heads, clusters + 1)
        return tuple(query.new_empty(shape, dtype=torch.int32) for shape in shapes)

    of_queries = lists(query.shape[2], cluster_size_q)
    if shared_qk:
        return *of_queries, *(query.new_empty(0, dtype=torch.int32) for _ in range(2))
    return *of_queries, *lists(key.shape[2], cluster_size_k)


def _fake_nearest(rows: Tensor, centroids: Tensor) -> Tensor:
    return rows.new_empty((rows.shape[0], centroids.shape[0], rows.shape[2]), dtype=torch.int32)


def _fake_sums(query: Tensor, key: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(centroids), centroids.new_empty(centroids.shape[:2])


def _count_versions(keys: Any, centroids: Tensor, counts: Tensor, *args: Any) -> None:
    """What changes in place tells autograd so, which does not know it of operators from C++."""
    torch.autograd.graph.increment_version((centroids, counts))
    with torch._C._AutoDispatchBelowADInplaceOrView():
        operator = torch.ops.attnx.update_centroids_.default
        operator.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, centroids, counts, *args)


def update(centroids: Tensor, counts: Tensor, query: Tensor, key: Tensor, decay: float, group: str) -> None:
    """Moves centroids after adding up what the processes of the group have; of one process where it has no name."""
    sums, members = torch.ops.attnx.centroid_sums(query, key, centroids)
    if group:
        collectives = torch.ops._c10d_functional
        flat = torch.cat((sums.flatten(), members.flatten()))
        flat = collectives.wait_tensor(collectives.all_reduce(flat, "sum", group))
        sums, members = flat[: sums.numel()].view_as(sums), flat[sums.numel() :].view_as(members)
    torch.ops.attnx.update_centroids_(centroids, counts, sums, members, decay)


def _save_what_moves(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, *ctx.others = inputs  # saved tensors must not change, and another backward may move the centroids
    ctx.save_for_backward(query, key)


def _move(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    query, key = ctx.saved_tensors
    centroids, counts, decay, group = ctx.others
    update(centroids, counts, query.detach(), key.detach(), decay, group)
    return grad, None, None, None, None, None


def _register_move() -> None:
    """An operator of its own, since in a backward compilers and checkpoints alike leave a change where it stands."""
    library = _operators._library
    library.define(
        f"{MOVE}(Tensor query, Tensor key, Tensor centroids, Tensor counts, float decay, str group) -> Tensor"
    )
    library.impl(MOVE, lambda query, *args: query.clone(), "CompositeExplicitAutograd")
    torch.library.register_fake(f"attnx::{MOVE}", lambda query, *args: torch.empty_like(query))
    torch.library.register_autograd(f"attnx::{MOVE}", _move, setup_context=_save_what_moves)


def _register_helper(name: str, fake: Any) -> None:
    """Of the operators around the attention, which need what it needs of a backend."""

    def refuse(query: Tensor, *args: Any) -> Any:
        raise NotImplementedError(_capability.refusal(NAME, {"query": query, "key": query, "value": query}))

    torch.library.register_fake(f"attnx::{name}", fake)
    torch.library.impl(f"attnx::{name}", "CompositeExplicitAutograd", refuse)


def register() -> None:
    for name in (NAME, f"{NAME}_backward"):
        _operators.register_refusal(name)
        _operators.register_looping_vmap(name)
    torch.library.register_fake(f"attnx::{NAME}", _fake_attention)
    torch.library.register_fake(f"attnx::{NAME}_backward", _fake_backward)
    _operators.register_autograd(NAME)
    _operators.refuse_double_backward(f"{NAME}_backward")
    for device_type in ("cpu", "cuda"):
        _operators.register_autocast(NAME, device_type)
    _register_helper("route", _fake_route)
    _register_helper("nearest_centroids", _fake_nearest)
    _register_helper("centroid_sums", _fake_sums)
    _register_helper(UPDATE, lambda centroids, counts, sums, members, decay: None)
    _register_move()
    _operators._library.impl(UPDATE, _count_versions, "ADInplaceOrView", with_keyset=True)
