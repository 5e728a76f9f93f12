"""What DTensor must know of the operators: which shards of the arguments give which shards of the results."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from attnx._operators.schema import Arguments, Signature, signature

__all__ = ["register_sharding"]

# Whether sequences of the batch, or heads, are apart.
Axis: TypeAlias = Literal["batch", "heads"]

_OPERATORS = (
    "sigmoid_attention",
    "sigmoid_attention_backward",
    "softmax_attention",
    "softmax_attention_backward",
    "sigmoid_attention_jvp",
    "softmax_attention_jvp",
    "sigmoid_attention_varlen",
    "sigmoid_attention_varlen_backward",
    "softmax_attention_varlen",
    "softmax_attention_varlen_backward",
    "softplus_attention",
    "softplus_attention_backward",
    "softplus_attention_varlen",
    "softplus_attention_varlen_backward",
    "sharpened_softplus_attention",
    "sharpened_softplus_attention_backward",
    "sharpened_softplus_attention_varlen",
    "sharpened_softplus_attention_varlen_backward",
    "block_sparse_attention",
    "block_sparse_attention_backward",
    "block_sparse_attention_varlen",
    "block_sparse_attention_varlen_backward",
    "disentangled_attention",
    "disentangled_attention_backward",
    "gated_delta_rule",
    "gated_delta_rule_backward",
    "linear_attention",
    "linear_attention_backward",
    "probabilistic_attention",
    "probabilistic_attention_backward",
    "probabilistic_block_lists",
    "probabilistic_attention_varlen",
    "probabilistic_attention_varlen_backward",
    "sparse_linear_attention",
    "sparse_linear_attention_backward",
    "sparse_linear_attention_varlen",
    "sparse_linear_attention_varlen_backward",
    "sparse_linear_block_map",
    "sparse_linear_block_map_varlen",
    "sparse_linear_labels",
    "routing_attention",
    "routing_attention_backward",
    "route",
    "route_varlen",
    "nearest_centroids",
    "centroid_sums",
    "update_centroids_",
    "move_centroids_in_backward",
    "move_average_in_backward",
    "block_means",
    "block_statistics",
    "range_means",
    "attention_key_weights",
    "attention_row_weights",
    "attention_max_logits",
    "pointer_sample",
)
# Packed sequences begin with tokens, and have heads second, too; these begin with heads, and these have none.
_PACKED_BY_HEAD = ("logsumexp", "gain", "shift", "key_bias", "key_mask")
_OFFSETS = ("cu_seqlens_q", "cu_seqlens_k")
# These are for each head, these for each sequence, and these for all. Every other tensor begins with (batch, heads).
_BY_HEAD = (
    *("alibi_slopes", "sink", "bias", "memory_key", "memory_value"),
    *("centroids", "counts", "sums", "members", "average", "target"),
)
_BY_SEQUENCE = ("seqused_k", "leftpad_k", "seqused_q", "leftpad_q", "seqused", "leftpad", "lead", "ranges")
_FOR_ALL = ("keep", "seed", "offset", "table_index")
# These get a gradient on request, which is empty without one.
_ON_REQUEST = ("attn_mask", "distance_bias", "key_bias", "key_mask", "block_bias", "query_table", "key_table")


def register_sharding() -> None:
    """Teaches ``torch.distributed.tensor.DTensor`` the operators of attnx, forward and backward, in this process.

    After it attnx's functions take DTensors whose ``placements`` shard the batch, ``Shard(0)``, or heads, ``Shard(1)``,
    or replicate, in any combination over the dimensions of a mesh, and nothing is sent. Heads stay apart where the
    number of processes divides those of query and of key, or key has one, whose gradient is a sum over processes then.
    DTensor gathers what is sharded otherwise, and everything that has dropout or draws blocks, as what is drawn depends
    on the place of a head; sequences belong to :func:`ring_softmax_attention` and its like. Numbers of heads, as a
    sink, are DTensors ``Shard(0)`` beside heads, or replicated; other tensors may stay plain within
    ``torch.distributed.tensor.experimental.implicit_replication``.

    Where a module's parameters and buffers are DTensors (``torch.distributed.tensor.distribute_module``), centroids and
    averages that move in training move by the tokens of all processes.

    Packed sequences have heads, ``Shard(1)``, and no batch to shard. DTensor refuses the operators of caches itself.

    Raises:
        NotImplementedError: this torch lets nobody register operators.
    """
    try:
        from torch.distributed.tensor.experimental import register_sharding as register
    except ImportError as error:
        raise NotImplementedError(
            "register_sharding: expected a torch that has torch.distributed.tensor.experimental.register_sharding, got "
            f"{torch.__version__}"
        ) from error
    for name in _OPERATORS:
        of = signature(name)
        register(of.operator)(partial(_shardings, of))


def _shardings(of: Signature, *args: Any) -> list[tuple[list[Placement], list[Placement | None]]]:
    """The placements of results and arguments that fit each other, along one dimension of a mesh."""
    arguments = of.bind(args)
    replicated: Placement = Replicate()
    found = [([replicated] * len(of.results), [replicated if _is_tensor(x) else None for x in args])]
    if arguments.get("seed") is not None:
        return found
    axes: tuple[Axis, ...] = ("heads",) if "cu_seqlens_q" in of.arguments else ("batch", "heads")
    for axis in axes:
        dims = {name: _dimension(axis, name, len(axes) == 1) for name in (*of.arguments, *of.results)}
        if _is_shared(arguments, dims):
            of_arguments = [_of_argument(x, dims[name]) for name, x in arguments.items()]
            found.append(([_of_result(name, arguments, dims) for name in of.results], of_arguments))
    return found


def _is_tensor(x: Any) -> bool:
    return hasattr(x, "placements")


def _dimension(axis: Axis, name: str, is_packed: bool) -> int | None:
    """The dimension of a tensor that counts what is apart along the axis."""
    name = name.removeprefix("grad_")
    if name in (*_FOR_ALL, *_OFFSETS) or name in (_BY_HEAD if axis == "batch" else _BY_SEQUENCE):
        return None
    begins_with_it = axis == "batch" or name in _BY_HEAD or (is_packed and name in _PACKED_BY_HEAD)
    return 0 if begins_with_it else 1


def _is_shared(arguments: Arguments, dims: dict[str, int | None]) -> bool:
    """Whether an argument is sharded along the axis, and all that have more than one there can be."""
    sizes, sharded = [], set()
    for name, x in arguments.items():
        dim = dims[name]
        if _is_tensor(x) and dim is not None and dim < x.ndim:
            sizes.append(x.shape[dim])
            sharded |= {i for i, placement in enumerate(x.placements) if placement.is_shard(dim)}
    if not sharded or sizes[0] == 1:
        return False
    mesh = next(x.mesh for x in arguments.values() if _is_tensor(x))
    shares = math.prod(mesh.size(i) for i in sharded)
    return all(size == 1 or size % shares == 0 for size in sizes)


def _of_argument(x: Any, dim: int | None) -> Placement | None:
    if not _is_tensor(x):
        return None
    return Replicate() if dim is None or dim >= x.ndim or x.shape[dim] == 1 else Shard(dim)


def _of_result(name: str, arguments: Arguments, dims: dict[str, int | None]) -> Placement:
    """A gradient of what processes share is a sum over them."""
    of, dim = name.removeprefix("grad_"), dims[name]
    if of != name and of in _ON_REQUEST and not arguments[f"{of}_gradient"]:
        return Replicate()
    if of == name or of == "block_bias":
        return Replicate() if name.startswith("key_") and arguments.get("shared_qk") else _shard(dim)
    if of in _BY_HEAD:
        return _shard(dim)
    if arguments[of] is None:
        return _shard(dim)
    placement = _of_argument(arguments[of], dim)
    assert placement is not None
    return Partial() if placement.is_replicate() else placement


def _shard(dim: int | None) -> Placement:
    return Partial() if dim is None else Shard(dim)
