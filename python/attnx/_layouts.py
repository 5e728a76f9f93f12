"""Inputs laid out as ``scaled_dot_product_attention`` takes them, for functions of (batch, heads, length, dim)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

_Function = TypeVar("_Function", bound=Callable[..., Any])


def takes_layouts(function: _Function) -> _Function:
    """Lets a function of (batch, heads, length, dim) take other layouts of query, key and value.

    These are (heads, length, dim), any number of leading dimensions, and a size of 1 in the place of a leading one or
    of the heads that the other two have. What comes back has the leading dimensions of the inputs.
    """

    @functools.wraps(function)
    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
        if _is_plain(query, key, value):
            return function(query, key, value, *args, **options)
        return _attend(function, query, key, value, *args, **options)

    return cast(_Function, attend)


def _is_plain(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether there is nothing to do, which is so also where the function has to refuse them."""
    if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)):
        return True
    if query.is_nested or key.is_nested or value.is_nested:
        return True
    of_query, of_key, of_value = query.shape, key.shape, value.shape
    rank = len(of_query)
    if rank < 3 or len(of_key) != rank or len(of_value) != rank:
        return True
    if rank != 4:
        return False
    # Names are quicker than slices of shapes, which make shapes.
    batch, heads, _, _ = of_query
    batch_k, heads_k, _, _ = of_key
    batch_v, heads_v, _, _ = of_value
    return batch == batch_k == batch_v and heads_k == heads_v and (heads != 1 or heads_k == 1)


def _attend(function: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
    leading = _leading(query, key, value)
    if leading is None:  # the function says which of them does not fit
        return function(*(_four(x, x.shape[:-3]) for x in (query, key, value)), *args, **options)
    attn_mask = options.get("attn_mask")
    if isinstance(attn_mask, Tensor) and attn_mask.dim() > 3 and len(leading) > 1:
        options["attn_mask"] = _flat_mask(attn_mask, leading)
    results = function(*four_dimensions(query, key, value), *args, **options)
    if isinstance(results, tuple):
        return tuple(_restored(x, leading) for x in results)
    return _restored(results, leading)


def four_dimensions(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The inputs as (batch, heads, length, dim), where they fit each other."""
    leading = None if _is_plain(query, key, value) else _leading(query, key, value)
    if leading is None:
        return query, key, value
    kv_heads = torch.broadcast_shapes(key.shape[-3:-2], value.shape[-3:-2])
    heads = kv_heads if query.shape[-3] == 1 else query.shape[-3:-2]
    query = query.expand(*leading, *heads, *query.shape[-2:])
    key, value = (x.expand(*leading, *kv_heads, *x.shape[-2:]) for x in (key, value))
    return _four(query, leading), _four(key, leading), _four(value, leading)


def _leading(query: Tensor, key: Tensor, value: Tensor) -> torch.Size | None:
    """The leading dimensions of the output, or None where those of the inputs, or heads, do not broadcast."""
    if _broadcast(key.shape[-3:-2], value.shape[-3:-2]) is None:
        return None
    return _broadcast(query.shape[:-3], key.shape[:-3], value.shape[:-3])


def _broadcast(*shapes: torch.Size) -> torch.Size | None:
    try:
        return torch.broadcast_shapes(*shapes)
    except RuntimeError:
        return None


def _four(x: Tensor, leading: torch.Size) -> Tensor:
    return x if len(leading) == 1 else x.flatten(0, -4) if leading else x[None]


def _restored(x: Tensor, leading: torch.Size) -> Tensor:
    return x if len(leading) == 1 else x.unflatten(0, leading) if leading else x[0]


def _flat_mask(attn_mask: Tensor, leading: torch.Size) -> Tensor:
    """A mask of (*leading, heads, length_q, length_k), or the last of these, as one of four dimensions."""
    own = attn_mask.shape[:-3]
    if all(size == 1 for size in own):
        return attn_mask.flatten(0, -4)
    if len(own) > len(leading) or _broadcast(own, leading) != leading:
        raise RuntimeError(
            f"attn_mask: expected leading dimensions that broadcast to {tuple(leading)}, those of query, got shape "
            f"{tuple(attn_mask.shape)}"
        )
    return attn_mask.expand(*leading, *attn_mask.shape[-3:]).flatten(0, -4)
