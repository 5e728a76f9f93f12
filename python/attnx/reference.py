"""The operators' definitions: a few lines of float64 PyTorch each, differentiable, without any attention kernel.

Every test compares with these. They take the arguments of the functions of the same name, compute in float64
whatever the inputs are, and hold the whole score matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from attnx.block_mask import BlockMask, dense_bias
from attnx.functional import SigmoidBias

__all__ = [
    "block_sparse_attention",
    "sigmoid_attention",
    "sigmoid_attention_varlen",
    "softmax_attention",
    "softmax_attention_varlen",
]


def _distance(length_q: int, length_k: int, device: torch.device) -> Tensor:
    """(length_q, length_k): how far key j lies before query i, aligned so that the last query meets the last key."""
    i = torch.arange(length_q, device=device)[:, None]
    j = torch.arange(length_k, device=device)
    return i + length_k - length_q - j


def _visible(distance: Tensor, is_causal: bool, window: tuple[int, int]) -> Tensor:
    left, right = window
    if is_causal:
        right = 0
    visible = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        visible &= distance <= left
    if right >= 0:
        visible &= -distance <= right
    return visible


def _per_head(x: Tensor, heads: int) -> Tensor:
    return x.double().expand(heads)[:, None, None]


def _logits(query: Tensor, key: Tensor, scale: float | None, alibi_slopes: Tensor | None, distance: Tensor) -> Tensor:
    """(batch, heads, length_q, length_k)."""
    heads, head_dim = query.shape[1], query.shape[3]
    key = key.double().repeat_interleave(heads // key.shape[1], dim=1)
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    logits = scale * query.double() @ key.transpose(-1, -2)
    if alibi_slopes is not None:
        logits = logits - _per_head(alibi_slopes, heads) * distance.abs()
    return logits


def _weighted(weights: Tensor, visible: Tensor, value: Tensor) -> Tensor:
    """sum_j weights[i, j] value[j] over the visible keys alone, so that what a hidden key holds has no effect."""
    heads = weights.shape[1]
    value = value.double().repeat_interleave(heads // value.shape[1], dim=1)
    if bool(value.isfinite().all()):
        return weights @ value
    terms = weights[..., None] * value[:, :, None]
    return terms.where(visible[..., None], 0.0).sum(-2)


def _sigmoid_bias(bias: SigmoidBias, length_k: int, visible: Tensor) -> Tensor | float:
    """What a bias that is no tensor adds to the logits."""
    if bias is None:
        return -math.log(max(length_k, 1))
    if bias == "row":
        return -visible.sum(-1, keepdim=True).clamp(min=1).double().log()
    return bias


def _softmax(logits: Tensor, visible: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The output and logsumexp of logits that are -inf where a key is not visible."""
    logsumexp = logits.logsumexp(-1)
    # A row without keys has a logsumexp of -inf; +inf in its place makes every weight 0, gradients included.
    weights = (logits - logsumexp.where(visible.any(-1), math.inf)[..., None]).exp()
    return _weighted(weights.where(visible, 0.0), visible, value), logsumexp


def sigmoid_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: SigmoidBias = None,
    scale: float | None = None,
    is_causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    heads, length_q, length_k = query.shape[1], query.shape[2], key.shape[2]
    distance = _distance(length_q, length_k, query.device)
    visible = _visible(distance, is_causal, window)
    logits = _logits(query, key, scale, alibi_slopes, distance)
    added = _per_head(bias, heads) if isinstance(bias, Tensor) else _sigmoid_bias(bias, length_k, visible)
    return _weighted((logits + added).sigmoid().where(visible, 0.0), visible, value)


def softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    return_logsumexp: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    distance = _distance(query.shape[2], key.shape[2], query.device)
    visible = _visible(distance, is_causal, window)
    logits = _logits(query, key, scale, alibi_slopes, distance).where(visible, -math.inf)
    output, logsumexp = _softmax(logits, visible, value)
    return (output, logsumexp) if return_logsumexp else output


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    *,
    score: Literal["softmax", "sigmoid"] = "softmax",
    bias: SigmoidBias = None,
    block_bias: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    return_logsumexp: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    length_q, length_k = query.shape[2], key.shape[2]
    block_q, block_k = block_mask.block_size
    key_blocks = -(-length_k // block_k)

    def each_element(blocks: Tensor) -> Tensor:
        elements = blocks.repeat_interleave(block_q, -2).repeat_interleave(block_k, -1)
        return elements[..., :length_q, :length_k]

    distance = _distance(length_q, length_k, query.device)
    in_band = _visible(distance, is_causal, (-1, -1))
    visible = (each_element(block_mask.to_dense(key_blocks)) & in_band).expand(*query.shape[:2], -1, -1)
    logits = _logits(query, key, scale, None, distance)
    if block_bias is not None:
        lists = block_mask.kv_num_blocks, block_mask.kv_indices
        logits = logits + each_element(dense_bias(*lists, block_bias.double(), key_blocks))
    if score == "sigmoid":
        return _weighted(
            (logits + _sigmoid_bias(bias, length_k, in_band)).sigmoid().where(visible, 0.0), visible, value
        )
    output, logsumexp = _softmax(logits.where(visible, -math.inf), visible, value)
    return (output, logsumexp) if return_logsumexp else output


def _each_sequence(
    attention: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
) -> Tensor:
    outputs = []
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    if len(ends_q) == 1:  # no sequence: the same as one without tokens
        ends_q, ends_k = ends_q * 2, ends_k * 2
    for q0, q1, k0, k1 in zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False):
        q, k, v = (x.transpose(0, 1)[None] for x in (query[q0:q1], key[k0:k1], value[k0:k1]))
        outputs.append(attention(q, k, v)[0].transpose(0, 1))
    return torch.cat(outputs)


def sigmoid_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    **options: Any,
) -> Tensor:
    return _each_sequence(
        lambda q, k, v: sigmoid_attention(q, k, v, **options), query, key, value, cu_seqlens_q, cu_seqlens_k
    )


def softmax_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    return_logsumexp: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    # The logsumexp rides along as one more feature.
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output, logsumexp = softmax_attention(q, k, v, return_logsumexp=True, **options)
        return torch.cat([output, logsumexp[..., None]], -1)

    both = _each_sequence(attention, query, key, value, cu_seqlens_q, cu_seqlens_k)
    output, logsumexp = both[..., :-1], both[..., -1].transpose(0, 1)
    return (output, logsumexp) if return_logsumexp else output
