"""What users say of the terms of logits, as operators take it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import TypedDict

from attnx import _arguments, _capability
from attnx._random import draw_round


class TermOptions(TypedDict, total=False):
    """These options of functions are terms of logits."""

    softcap: float | None
    key_bias: Tensor | None
    key_mask: Tensor | None
    dropout_p: float
    generator: torch.Generator | None
    seed: int | Tensor | None
    offset: int | Tensor | None


def resolve_terms(
    operator: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    softcap: float | None = None,
    attn_mask: Tensor | None = None,
    distance_bias: Tensor | None = None,
    row_bounds: Tensor | None = None,
    key_bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What the operator takes of pairs (attn_mask, distance_bias and row_bounds), and the rest of its terms.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what came.
        NotImplementedError: no kernel on this device has one of them, or its gradient.
    """
    _arguments.optional_tensors(
        attn_mask=attn_mask,
        distance_bias=distance_bias,
        row_bounds=row_bounds,
        key_bias=key_bias,
        key_mask=key_mask,
    )
    if softcap is not None:
        softcap = _arguments.number("softcap", softcap, "None or a number above 0")
    dropout_p = _arguments.number("dropout_p", dropout_p, "a probability from 0 to below 1")
    if not 0 <= dropout_p < 1:
        _arguments.refuse("dropout_p", "a probability from 0 to below 1", dropout_p)
    if attn_mask is not None:
        attn_mask = _four_dimensions(attn_mask, key)
    if key_mask is not None and key_mask.dtype == torch.bool:
        key_mask = key_mask.to(torch.float64 if query.dtype == torch.float64 else torch.float32)
    drawn: tuple[Tensor | None, Tensor | None] = (None, None)
    if dropout_p > 0:
        drawn = draw_round(generator, seed, offset, query.device)
    given = {
        "softcap": softcap,
        "attn_mask": attn_mask,
        "distance_bias": distance_bias,
        "row_bounds": row_bounds,
        "key_bias": key_bias,
        "key_mask": key_mask,
    }
    if dropout_p > 0 or any(x is not None for x in given.values()):
        _capability.require(operator, {"query": query, "key": key, "value": value, "dropout_p": dropout_p} | given)
    return (attn_mask, distance_bias, row_bounds), (softcap, key_bias, key_mask, dropout_p, *drawn)


def _four_dimensions(attn_mask: Tensor, key: Tensor) -> Tensor:
    """Leading dimensions of size 1 go where broadcasting has them, and one number may serve all keys of a row."""
    if not 2 <= attn_mask.dim() <= 4:
        raise RuntimeError(
            "attn_mask: expected 2 to 4 dimensions, (batch, heads, length_q, length_k) or the last of these, got shape "
            f"{tuple(attn_mask.shape)}"
        )
    if attn_mask.shape[-1] == 1 and key.dim() == 4:
        attn_mask = attn_mask.expand(*attn_mask.shape[:-1], key.shape[2])
    return attn_mask[(None,) * (4 - attn_mask.dim())]
