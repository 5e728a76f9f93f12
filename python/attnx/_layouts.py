"""Inputs of other ranks than four, and of sizes that broadcast, as ``scaled_dot_product_attention`` takes them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

_Function = TypeVar("_Function", bound=Callable[..., Any])


def any_rank(function: _Function) -> _Function:
    """Lets a function of (batch, heads, length, dim) tensors take what ``scaled_dot_product_attention`` takes.

    Without a batch, (heads, length, dim), results have none either; of more than four dimensions all but the last three
    count as batch, in order. Where one of the inputs has 1 in the place of another's batch or heads, it serves all.
    """

    @functools.wraps(function)
    def attention(query: Any, key: Any, value: Any, *args: Any, **options: Any) -> Any:
        if _is_plain(query, key, value):
            return function(query, key, value, *args, **options)
        leading = tuple(map(_common, *(x.shape[:-3] for x in (query, key, value))))
        if options.get("attn_mask") is not None:
            options["attn_mask"] = _flat_mask(options["attn_mask"], leading)
        results = function(*four_dimensions(query, key, value), *args, **options)
        if isinstance(results, tuple):
            return tuple(_restored(x, leading) for x in results)
        return _restored(results, leading)

    return attention  # type: ignore[return-value]


def _is_plain(query: Any, key: Any, value: Any) -> bool:
    """Whether there is nothing to do, which includes what the function refuses and what it treats by itself."""
    usual = type(query) is type(key) is type(value) is Tensor  # which is quickly told
    if not usual and not all(isinstance(x, Tensor) and not x.is_nested for x in (query, key, value)):
        return True
    q, k, v = query.shape, key.shape, value.shape
    rank = len(q)
    if rank < 3 or len(k) != rank or len(v) != rank:
        return True
    return bool(rank == 4 and q[0] == k[0] == v[0] and k[1] == v[1] and q[1] >= k[1])


def four_dimensions(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The inputs as (batch, heads, length, dim); sizes that fit in no way are left for operators to refuse."""
    if _is_plain(query, key, value):
        return query, key, value
    if query.dim() == 3:
        query, key, value = query[None], key[None], value[None]
    for dim in range(query.dim() - 3):
        size = _common(*(x.shape[dim] for x in (query, key, value)))
        query, key, value = (_expanded(x, dim, size) for x in (query, key, value))
    heads = _common(key.shape[-3], value.shape[-3])
    key, value = _expanded(key, -3, heads), _expanded(value, -3, heads)
    if query.shape[-3] < heads:
        query = _expanded(query, -3, heads)
    if query.dim() == 4:
        return query, key, value
    query, key, value = (x.flatten(0, -4) for x in (query, key, value))
    return query, key, value


def _common(*sizes: int) -> int:
    """The size that those of 1 serve."""
    return next((size for size in sizes if size != 1), 1)


def _expanded(x: Tensor, dim: int, size: int) -> Tensor:
    if x.shape[dim] != 1 or size == 1:
        return x
    sizes = [-1] * x.dim()
    sizes[dim] = size
    return x.expand(sizes)


def _flat_mask(mask: Any, leading: tuple[int, ...]) -> Any:
    """A mask of as many dimensions as the inputs, with one in the place of all those that count as batch."""
    if not isinstance(mask, Tensor) or len(leading) < 2 or mask.dim() <= 3:
        return mask
    own = mask.shape[:-3]
    if all(size == 1 for size in own):
        return mask.reshape(1, *mask.shape[-3:])
    return mask.expand(*leading, *mask.shape[-3:]).flatten(0, -4)


def _restored(x: Tensor, leading: tuple[int, ...]) -> Tensor:
    return x[0] if not leading else x if len(leading) == 1 else x.unflatten(0, leading)
