"""Masks that mean what those of ``torch.nn.MultiheadAttention`` do, as the functions take them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnx import _arguments


def refuse(module: str, instead: str, **given: Tensor | None) -> None:
    """Refuses masks that an attention does not have.

    Raises:
        ValueError: one is given; the message says what to use instead.
    """
    for name, x in given.items():
        if x is not None:
            raise ValueError(
                f"{name}: expected None, as {module} has no such mask, got {_arguments.describe(x)}; use {instead}"
            )


def of_call(query: Tensor, key: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> dict[str, Any]:
    """The ``attn_mask`` and, of boolean padding, the ``key_mask`` or else the ``key_bias`` of functions.

    Args:
        query: (batch, heads, length_q, head_dim).
        key: (batch, kv_heads, length_k, head_dim).
        attn_mask: as of :meth:`attnx.nn.projections.ProjectedAttention.forward`.
        key_padding_mask: (batch, length_k).

    Raises:
        ValueError: a mask does not fit.
    """
    taken: dict[str, Any] = {}
    if attn_mask is not None:
        taken["attn_mask"] = _pairs(query, key, attn_mask)
    if key_padding_mask is not None:
        expected = f"bool or floating point of shape {(query.shape[0], key.shape[2])}"
        _check("key_padding_mask", key_padding_mask, expected)
        if key_padding_mask.shape != (query.shape[0], key.shape[2]):
            _fail("key_padding_mask", expected, key_padding_mask)
        # A key of weight 0 still takes part in the sum of a softmax, and -inf hides it from all scores.
        taken["key_bias"] = _added(key_padding_mask, query)[:, None]
    return taken


def _added(x: Tensor, query: Tensor) -> Tensor:
    """What the logits get, in their type: -inf for True."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    if x.dtype != torch.bool:
        return x.to(dtype)
    return torch.zeros(x.shape, dtype=dtype, device=x.device).masked_fill(x, float("-inf"))


def _pairs(query: Tensor, key: Tensor, attn_mask: Tensor) -> Tensor:
    """A mask of four dimensions, where True takes part."""
    (batch, heads, length_q), length_k = query.shape[:3], key.shape[2]
    expected = (
        f"bool or floating point of shape {(length_q, length_k)}, {(batch * heads, length_q, length_k)} or "
        f"{(batch, heads, length_q, length_k)}"
    )
    _check("attn_mask", attn_mask, expected)
    if attn_mask.dim() == 3 and attn_mask.shape[0] in (1, batch * heads):
        leading = (1, 1) if attn_mask.shape[0] == 1 else (batch, heads)
        mask = attn_mask.unflatten(0, leading)
    else:
        mask = attn_mask[None, None] if attn_mask.dim() == 2 else attn_mask
    full = batch, heads, length_q, length_k
    if mask.dim() != 4 or any(n not in (1, m) for n, m in zip(mask.shape[:3], full, strict=False)):
        _fail("attn_mask", expected, attn_mask)
    if mask.shape[3] != length_k:
        _fail("attn_mask", expected, attn_mask)
    if mask.dtype == torch.bool:
        return mask.logical_not()
    return mask if mask.dtype == query.dtype else _added(mask, query)


def _check(name: str, x: object, expected: str) -> None:
    if not isinstance(x, Tensor) or not (x.dtype == torch.bool or x.is_floating_point()):
        _fail(name, expected, x)


def _fail(name: str, expected: str, x: object) -> None:
    dtype = f"{x.dtype}, " if isinstance(x, Tensor) else ""
    raise ValueError(f"{name}: expected {expected}, got {dtype}{_arguments.describe(x)}")
