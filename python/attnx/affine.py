"""Affine-scaled attention: a gate on what softmax attention gives a row, and a share of the plain sum of its values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnx import _arguments, _shards
from attnx.functional import Window, softmax_attention

__all__ = ["affine_attention", "visible_sums"]


def affine_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    addend: Tensor | None = None,
    *,
    scale: float | Tensor | None = None,
    is_causal: bool = False,
    window: Window = None,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    r"""Softmax attention whose rows are scaled, and moved by the sum of the values that they see.

    .. math:: O'_i = \alpha_i O_i + \beta_i \sum_{j \in V(i)} v_j

    with the gate :math:`\alpha`, the addend :math:`\beta` and the keys V(i) that row i sees. So the weights of a row
    are :math:`\alpha_i P_{ij} + \beta_i`. The gate alone is what gated attention puts on a head's output. A gate of 1
    without addend is :func:`attnx.softmax_attention`, bit for bit.

    Args:
        query: (batch, heads, length_q, head_dim).
        key: (batch, kv_heads, length_k, head_dim).
        value: (batch, kv_heads, length_k, value_dim).
        gate: (batch, heads, length_q), or what broadcasts to it; float32 (float64 for float64 inputs).
        addend: like gate, or None for none.
        scale, is_causal, window, alibi_slopes, sink: as of :func:`attnx.softmax_attention`.

    The sums over values are prefix sums, so they take time and memory in proportion to the values, in float32, or in
    float64 where a window makes them differences. They are finite only where all values are.

    Returns:
        (batch, heads, length_q, value_dim) in the dtype of query, differentiable with respect to all tensors. A row
        that sees no key gives 0.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what came.

    Source: "Affine-Scaled Attention", arXiv 2602.23057.
    """
    _shards.expect_whole("affine_attention")
    _arguments.tensors(query=query, key=key, value=value)
    sums_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    for name, x in (("gate", gate), ("addend", addend)):
        if x is not None or name == "gate":
            _check_rows(name, x, query, sums_dtype)
    options: dict[str, Any] = {"scale": scale, "alibi_slopes": alibi_slopes, "sink": sink}
    band: dict[str, Any] = {"is_causal": is_causal, "window": _arguments.window(window)}
    output: Tensor = softmax_attention(query, key, value, **options, **band)
    rows = gate.to(sums_dtype)[..., None] * output
    if addend is not None:
        heads, kv_heads = query.shape[1], key.shape[1]
        sums = visible_sums(value, query.shape[2], **band, dtype=sums_dtype)
        weights = addend.expand(query.shape[:3]).unflatten(1, (kv_heads, heads // kv_heads))
        rows = rows + (weights[..., None] * sums[:, :, None]).flatten(1, 2)
    return rows.to(query.dtype)


def visible_sums(x: Tensor, length_q: int, *, is_causal: bool, window: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Sums the rows that each query sees under a band: (..., length_k, dim) gives (..., length_q or 1, dim)."""
    left, right = window
    right = 0 if is_causal else right
    if left < 0 and right < 0:
        return x.sum(-2, keepdim=True, dtype=dtype)
    length_k = x.shape[-2]
    position = torch.arange(length_q, device=x.device) + (length_k - length_q)
    end = torch.full_like(position, length_k) if right < 0 else (position + right + 1).clamp(0, length_k)
    # A difference of two long sums would lose what float32 has for a short window.
    sums = nn.functional.pad(x.to(dtype if left < 0 else torch.float64).cumsum(-2), (0, 0, 1, 0))
    if left < 0:
        return sums.index_select(-2, end)
    first = torch.minimum((position - left).clamp(0, length_k), end)
    return (sums.index_select(-2, end) - sums.index_select(-2, first)).to(dtype)


def _check_rows(name: str, x: object, query: Tensor, dtype: torch.dtype) -> None:
    _arguments.tensors(**{name: x})
    assert isinstance(x, Tensor)
    rows = query.shape[:3]
    if x.dim() != 3 or any(n not in (1, m) for n, m in zip(x.shape, rows, strict=True)):
        _arguments.refuse(name, f"what broadcasts to (batch, heads, length_q) = {tuple(rows)}", x)
    if (x.dtype, x.device) != (dtype, query.device):
        raise RuntimeError(f"{name}: expected {dtype} on {query.device}, got {x.dtype} on {x.device}")
