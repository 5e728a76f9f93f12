"""Length-scaled softplus attention, plain and sharpened."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnx import _arguments, _nested, _shards
from attnx._layouts import takes_layouts
from attnx.functional import Window

__all__ = ["softplus_attention", "softplus_attention_varlen"]

_ops = torch.ops.attnx
_MOST_POWER = 64


@takes_layouts
def softplus_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    sharpen: int | None = None,
    scale: float | Tensor | None = None,
    is_causal: bool = False,
    window: Window = None,
    position_offset: int = 0,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    enable_gqa: bool = False,
    return_logsumexp: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Softplus attention whose logits grow with the logarithm of the keys: LSSA, and sharpened LSSAR.

    .. math:: t_{ij} = \ln D \ln n_i \; \frac{q_i}{|q_i|} \cdot \frac{k_j}{|k_j|}, \qquad
        A_{ij} = \frac{\ln(1 + e^{t_{ij}})}{Z_i}, \qquad O = A V

    with the head dimension D, the number :math:`n_i` of keys that row i sees and the sum :math:`Z_i` of the row. The
    softmax's exponential is gone, and logits are bounded, so that weights stay spread alike at any length. With
    ``sharpen=p`` the weights above their mean are raised to a power, and the others are 0:

    .. math:: u_{ij} = n_i A_{ij} - 1, \qquad O_i = \frac{\sum_j \max(u_{ij}, 0)^p\, v_j}{\sum_j \max(u_{ij}, 0)^p}

    where a row of at most 3 keys has :math:`u = n A`, and one whose weights are all equal, so that none is above
    the mean, gives 0.

    Args:
        query: (batch, heads, length_q, head_dim). Rotary embeddings belong before this function.
        key: (batch, kv_heads, length_k, head_dim); heads is a multiple of kv_heads, and consecutive query
            heads share a key head.
        value: (batch, kv_heads, length_k, value_dim).
        sharpen: the power p, a whole number from 1 to 64, or None for none. The source has 15 for lengths beyond those
            of the training, and found 3 best at these.
        scale: what stands in the place of ln D; a number, or a tensor of shape () or (heads,), which may require a
            gradient.
        is_causal, window, position_offset: as of :func:`attnx.softmax_attention`.
        seqused_k, leftpad_k: likewise; n counts the keys that are left.
        return_logsumexp: also return ln Z, (batch, heads, length_q) float32 (float64 for float64), which is
            differentiable, too. :func:`attnx.merge_attention` merges outputs over parts of the keys by it, where
            ``scale`` makes up for their number. There is none with ``sharpen``.

    ``enable_gqa``, other layouts and nested tensors are taken as by :func:`attnx.sigmoid_attention`. The product of
    query and key is rounded like softmax's: their rows are normalised in float32 (float64 for float64), and then take
    the dtype of the inputs again.

    Returns:
        (batch, heads, length_q, value_dim) in the dtype of query, differentiable with respect to all tensors but
        lengths. A row that sees no key gives 0. Gradients are the same bits every time.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what came.
        NotImplementedError: no kernel for these arguments on this device; there is one for the CPU.

    Source: "Softplus Attention with Re-weighting Boosts Length Extrapolation in Large Language Models",
    arXiv 2501.13428. That a row counts the keys that it sees is a choice of ours where there is a window.
    """
    power = _power(sharpen, return_logsumexp)
    _arguments.flag("enable_gqa", enable_gqa)
    options: dict[str, Any] = {"is_causal": is_causal, "window": window, "position_offset": position_offset}
    if isinstance(query, Tensor) and query.is_nested:
        _nested.expect_no_lengths(seqused_k=seqused_k, leftpad_k=leftpad_k)
        options |= {"sharpen": sharpen, "scale": scale, "return_logsumexp": return_logsumexp}
        return _nested.attend(softplus_attention_varlen, query, key, value, **options)
    _shards.expect_whole("softplus_attention")
    _arguments.tensors(query=query, key=key, value=value)
    band = _band(**options)
    lengths = ends, starts = _arguments.key_lengths(seqused_k, leftpad_k, query, key)
    if query.dim() == key.dim() == 4:
        used: Any = key.shape[2]
        if ends is not None and starts is not None and ends.shape == starts.shape == query.shape[:1]:
            used = (ends - starts)[:, None].long()
        keys = _keys_seen(lambda: torch.arange(-query.shape[2], 0, device=query.device) + used, used, band)
        keys = keys[..., None, :, None] if isinstance(keys, Tensor) else keys
        query, key, scale = _normalised(query, key, keys, scale)
    return _attend("softplus_attention", (query, key, value, *lengths, scale, *band), power, return_logsumexp)


def softplus_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    sharpen: int | None = None,
    scale: float | Tensor | None = None,
    is_causal: bool = False,
    window: Window = None,
    position_offset: int = 0,
    has_padding: bool = False,
    return_logsumexp: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`softplus_attention` over sequences of different lengths, packed end to end.

    The arguments are those of :func:`softplus_attention` and, for the packing, of
    :func:`attnx.softmax_attention_varlen`. Masks are aligned to each sequence's own end.

    Returns:
        (total_q, heads, value_dim) in the dtype of query; with ``return_logsumexp`` also ln Z, (heads, total_q).
    """
    power = _power(sharpen, return_logsumexp)
    _shards.expect_whole("softplus_attention_varlen")
    _arguments.tensors(query=query, key=key, value=value)
    packing = of_q, of_k, *_ = _arguments.packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    padding = _arguments.flag("has_padding", has_padding)
    band = _band(is_causal, window, position_offset)
    fits = query.dim() == key.dim() == 3 and of_q.shape == of_k.shape and of_q.dim() == 1 and of_q.numel() > 1
    if fits:
        row = torch.arange(query.shape[0], device=query.device)
        sequence = torch.bucketize(row, of_q[1:], right=True, out_int32=True).clamp(max=of_q.numel() - 2)
        used = (of_k[1:] - of_k[:-1])[sequence].long()
        keys = _keys_seen(lambda: row - of_q[1:][sequence] + used, used, band)
        query, key, scale = _normalised(query, key, keys[:, None, None], scale, heads_dim=1)
    arguments = (query, key, value, *packing, padding, scale, *band)
    return _attend("softplus_attention_varlen", arguments, power, return_logsumexp)


def _power(sharpen: Any, return_logsumexp: Any) -> int | None:
    if _arguments.flag("return_logsumexp", return_logsumexp) and sharpen is not None:
        _arguments.refuse("return_logsumexp", "False with sharpen", return_logsumexp)
    expected = f"None or a whole number from 1 to {_MOST_POWER}"
    return None if sharpen is None else _arguments.integer("sharpen", sharpen, 1, _MOST_POWER, expected=expected)


def _band(is_causal: Any, window: Window, position_offset: Any) -> tuple[bool, int, int, int]:
    bounds = _arguments.window(window)
    return _arguments.flag("is_causal", is_causal), *bounds, _arguments.integer("position_offset", position_offset)


def _keys_seen(position: Callable[[], Tensor], used: Any, band: tuple[bool, int, int, int]) -> Any:
    """How many of the used keys the rows see that stand at these positions, before the offset.

    It is a number where that of the used keys is one and the band bounds nothing.
    """
    is_causal, left, right, offset = band
    right = 0 if is_causal else right
    if left < 0 and right < 0:
        return used
    at = position()
    first = 0 if left < 0 else (at + (offset - left)).clamp(min=0).clamp(max=used)
    end = used if right < 0 else (at + (offset + right + 1)).clamp(min=first).clamp(max=used)
    return end - first


def _normalised(
    query: Tensor, key: Tensor, keys: Any, scale: Any, heads_dim: int = -3
) -> tuple[Tensor, Tensor, float | None]:
    """Query and key of length 1, the query times ln n and a scale that is a tensor, and the scale that is a number."""
    if not (query.is_floating_point() and key.is_floating_point()):
        return query, key, None  # the operator says what it takes
    sums = torch.float64 if query.dtype == torch.float64 else torch.float32
    counts = keys.to(sums) if isinstance(keys, Tensor) else torch.full((), keys, dtype=sums, device=query.device)
    rows = _unit(query, sums, counts.clamp(min=1).log())
    number = math.log(query.shape[-1]) if scale is None else scale
    if isinstance(scale, Tensor):
        like = rows if heads_dim == -3 else rows.movedim(1, 0)[None]
        like, number = _arguments.with_scale(like, scale)
        rows = like if heads_dim == -3 else like[0].movedim(0, 1)
    else:
        number = _arguments.number("scale", number, "None, a number, or a tensor of shape () or (heads,)")
    return rows.to(query.dtype), _unit(key, sums).to(key.dtype), number


def _unit(x: Tensor, sums: torch.dtype, length: Tensor | None = None) -> Tensor:
    """Rows of this length, or of 1, in the direction of x, in the type of sums.

    A row that is not finite is NaN, and gets no gradient, as its key may be hidden from all queries.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=sums)
    if torch.is_grad_enabled() and x.requires_grad:
        finite = norm.isfinite()
        x = x.where(finite, 0.0)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=sums).where(finite, math.nan)
    norm = norm.clamp(min=1e-12)
    return x / norm if length is None else x * (length / norm)


def _attend(name: str, arguments: tuple[Any, ...], power: int | None, return_logsumexp: bool) -> Any:
    if power is not None:
        output, *_ = getattr(_ops, f"sharpened_{name}")(*arguments, power)
        return output
    output, logsumexp = getattr(_ops, name)(*arguments)
    return (output, logsumexp) if return_logsumexp else output
