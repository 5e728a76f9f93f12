"""Attention whose logits get a number for the distance between query and key, from a table of buckets."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attnx import _arguments
from attnx._scores import ScoreName, resolve_score
from attnx.functional import sigmoid_attention, softmax_attention

__all__ = ["distances", "relative_bias_attention", "relative_position_buckets"]


def distances(length_q: int, length_k: int, *, position_offset: int = 0, device: Any = None) -> Tensor:
    """i - j + position_offset for every entry of a ``distance_bias``: (length_q + length_k - 1,) int64, ascending."""
    length_q = _arguments.integer("length_q", length_q, 1)
    length_k = _arguments.integer("length_k", length_k, 1)
    offset = _arguments.integer("position_offset", position_offset)
    return torch.arange(1 - length_k + offset, length_q + offset, device=device)


def relative_position_buckets(
    length_q: int,
    length_k: int,
    *,
    buckets: int = 32,
    max_distance: int = 128,
    bidirectional: bool = True,
    position_offset: int = 0,
    device: Any = None,
) -> Tensor:
    """The bucket of each distance between queries and keys, as T5 has them.

    Half of the buckets hold one distance each; the others grow with the logarithm of the distance up to
    ``max_distance``, and the last one holds all beyond.

    Args:
        length_q, length_k: how many queries and keys there are.
        buckets: how many there are; with ``bidirectional`` half of them are for keys after the query, else those keys
            share the bucket of distance 0.
        max_distance: in tokens.
        position_offset: how many keys further on queries stand; in decoding, length_k - length_q.
        device: of the result.

    Returns:
        (length_q + length_k - 1,) int64, for :func:`attnx.relative_bias_attention`.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what came.

    Source: Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer",
    arXiv 1910.10683.
    """
    _arguments.flag("bidirectional", bidirectional)
    one_side = _arguments.integer("buckets", buckets, 4 if bidirectional else 2) // (2 if bidirectional else 1)
    exact = one_side // 2
    _arguments.integer("max_distance", max_distance, exact + 1)
    before = distances(length_q, length_k, position_offset=position_offset, device=device)
    size = before.abs() if bidirectional else before.clamp(min=0)
    # float32, as models that are trained round here.
    grown = (size.float() / exact).log() / math.log(max_distance / exact) * (one_side - exact)
    bucket = size.where(size < exact, (exact + grown.clamp(min=0).long()).clamp(max=one_side - 1))
    return bucket + one_side * (before < 0) if bidirectional else bucket


def relative_bias_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor,
    index: Tensor | None = None,
    *,
    score: ScoreName = "softmax",
    **options: Any,
) -> Any:
    r"""Attention whose logits get a learned number for the distance between query and key.

    .. math:: L_{ij} = s\, q_i \cdot k_j + t_{h, \text{index}(i - j)}

    Nothing of the size of the matrix of logits is made of it, as a mask would be.

    Args:
        query: (batch, heads, length_q, head_dim).
        key: (batch, kv_heads, length_k, head_dim).
        value: (batch, kv_heads, length_k, value_dim).
        table: (heads, buckets), float32 (float64 for float64 inputs), such as the transposed weight of T5's
            ``relative_attention_bias``. It may require a gradient.
        index: (length_q + length_k - 1,) int64 or int32: the bucket of distance i - j at i - j + length_k - 1. None:
            those of :func:`relative_position_buckets` for as many buckets as the table has.
        score: ``"softmax"`` or ``"sigmoid"``.
        options: all others of :func:`attnx.softmax_attention` or :func:`attnx.sigmoid_attention` but ``attn_mask`` and
            ``distance_bias``. T5 has a ``scale`` of 1.

    Returns:
        What the function of the score returns.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what came.

    Source: Raffel et al., arXiv 1910.10683; Shaw et al., arXiv 1803.02155, for distances as such.
    """
    _arguments.tensors(query=query, key=key, value=value, table=table)
    _arguments.optional_tensors(index=index)
    resolve_score(score)
    for name in ("attn_mask", "distance_bias"):
        if options.get(name) is not None:
            _arguments.refuse(name, "None beside a table", options[name])
    if table.dim() != 2 or table.shape[0] != query.shape[1]:
        raise RuntimeError(f"table: expected shape ({query.shape[1]}, buckets), got {tuple(table.shape)}")
    length_q, length_k = query.shape[2], key.shape[2]
    if index is None:
        index = relative_position_buckets(length_q, length_k, buckets=table.shape[1], device=table.device)
    check_index(index, length_q + length_k - 1, "buckets of the table", table.shape[1])
    attend: Any = softmax_attention if score == "softmax" else sigmoid_attention
    return attend(query, key, value, distance_bias=table.index_select(1, index)[None], **options)


def check_index(index: Tensor, count: int, what: str, numbers: int) -> None:
    if index.dtype not in (torch.int32, torch.int64) or index.shape != (count,):
        raise RuntimeError(
            f"index: expected int64 or int32 of shape ({count},), length_q + length_k - 1, got {index.dtype} of shape "
            f"{tuple(index.shape)}"
        )
    if _arguments.has_values(index):
        least, most = (int(x) for x in index.aminmax())
        if least < 0 or most >= numbers:
            raise RuntimeError(f"index: expected numbers from 0 to below {numbers}, the {what}, got {least} to {most}")
