"""Outputs of softmax attention over parts of the keys: what they make together, and how weight moves between parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnx import _arguments

__all__ = ["merge_attention", "redistribute_attention"]


def merge_attention(
    outputs: Sequence[Tensor], logsumexps: Sequence[Tensor], *, factors: Sequence[Tensor | float] | None = None
) -> tuple[Tensor, Tensor]:
    r"""Softmax attention over all keys, from the results over parts of them.

    .. math:: L = \log \sum_p e^{L_p}, \qquad O = \sum_p f_p\, e^{L_p - L} O_p

    Parts are disjoint sets of keys: those of other devices, a shared prefix, a cache and what came since. The result
    does not depend on how the keys were cut, up to rounding.

    Args:
        outputs: for each part (batch, heads, length, value_dim), of one shape and dtype.
        logsumexps: for each part (batch, heads, length), float32 (float64 for float64), as
            :func:`attnx.softmax_attention` returns them; -inf where a row sees no key of the part.
        factors: for each part a float or a tensor that broadcasts to (batch, heads, length), 1 by default: how many
            times its weights count. The logsumexp is without them.

    Returns:
        (batch, heads, length, value_dim) in the dtype of the outputs, and (batch, heads, length) in that of the
        logsumexps. A row that sees no key of any part gives 0, and -inf. Both are differentiable, in reverse and in
        forward mode, and any number of times.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what came.

    Source: Dao et al., "FlashAttention", arXiv 2205.14135, section 3.1.
    """
    if not outputs or len(outputs) != len(logsumexps):
        raise RuntimeError(
            f"logsumexps: expected one for each of at least one output, got {len(logsumexps)} for {len(outputs)}"
        )
    for output, logsumexp in zip(outputs, logsumexps, strict=True):
        _check("outputs", output, outputs[0])
        _check_logsumexp("logsumexps", logsumexp, output)
    if factors is not None and len(factors) != len(outputs):
        raise RuntimeError(f"factors: expected one for each of {len(outputs)} outputs, got {len(factors)}")

    parts = torch.stack(tuple(logsumexps))
    highest = parts.detach().amax(0)
    highest = highest.where(highest != -torch.inf, 0.0)
    weights = (parts - highest).exp()
    total = weights.sum(0)
    sees_none = total == 0
    total = total.where(~sees_none, 1.0)
    logsumexp = (highest + total.log()).where(~sees_none, -torch.inf)
    merged: Tensor | float = 0.0
    for i, output in enumerate(outputs):
        share = weights[i] / total
        if factors is not None:
            share = share * factors[i]
        merged = merged + share[..., None] * output
    assert isinstance(merged, Tensor)
    return merged.to(outputs[0].dtype), logsumexp


def redistribute_attention(
    output: Tensor,
    logsumexp: Tensor,
    source_output: Tensor,
    source_logsumexp: Tensor,
    target_output: Tensor | None = None,
    target_logsumexp: Tensor | None = None,
    *,
    keep: float | Tensor,
    where: Tensor | None = None,
) -> Tensor:
    r"""Takes weight from some keys of softmax attention, the source, and gives it to others.

    With the source's share of a row, :math:`m = e^{L_s - L}`, it keeps ``keep`` times its weights, and what is free,
    :math:`(1 - \text{keep})\, m`, goes to the target in proportion to the target's weights:

    .. math:: O' = O + (1 - \text{keep})\, m\, (O_t - O_s)

    Without a target it goes to all keys that are not of the source: with :math:`c = (1 - \text{keep}\, m) / (1 - m)`

    .. math:: O' = c\, O + (\text{keep} - c)\, m\, O_s

    A row whose weight is all the source's, or that sees no key of the target, stays as it is. Weights of a row still
    sum to 1.

    ACT tames attention sinks so in some heads: the source is the keys whose mean weight is above a threshold, ``keep``
    is 0.4, and the first row stays. VAR moves weight from sinks to tokens of the picture: these are the target.

    Args:
        output: (batch, heads, length, value_dim), over all keys.
        logsumexp: (batch, heads, length), float32 (float64 for float64), over all keys.
        source_output: like output, over the source's keys alone.
        source_logsumexp: like logsumexp, over the source's keys alone.
        target_output: like output, over the target's keys alone, or None.
        target_logsumexp: like logsumexp, over the target's keys alone; with ``target_output``, and only then.
        keep: what the source's weights are multiplied with, from 0 to 1; a tensor broadcasts to (batch, heads, length).
        where: bool, broadcasts to (batch, heads, length): the rows that change; all by default.

    Returns:
        Like output; differentiable with respect to all tensors.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what came.

    Sources: Yu et al., "Unveiling and Harnessing Hidden Attention Sinks", arXiv 2406.15765 (ACT); Kang et al., "See
    What You Are Told: Visual Attention Sink in Large Multimodal Models", arXiv 2503.03321 (VAR).
    """
    _check("output", output, output)
    _check("source_output", source_output, output)
    _check_logsumexp("logsumexp", logsumexp, output)
    _check_logsumexp("source_logsumexp", source_logsumexp, output)
    if (target_output is None) != (target_logsumexp is None):
        raise RuntimeError("target_logsumexp: expected one with target_output and None without")
    if target_output is not None and target_logsumexp is not None:
        _check("target_output", target_output, output)
        _check_logsumexp("target_logsumexp", target_logsumexp, output)
    if not isinstance(keep, Tensor):
        keep = _arguments.share("keep", keep, "a number from 0 to 1")
    if where is not None and (not isinstance(where, Tensor) or where.dtype != torch.bool):
        raise RuntimeError(f"where: expected a bool tensor, got {getattr(where, 'dtype', type(where).__name__)}")

    sums = logsumexp.dtype
    # A row without keys has no share to give. Rounding may take a share above 1.
    empty = source_logsumexp == -torch.inf
    share = (source_logsumexp.where(~empty, 0.0) - logsumexp.where(~empty, 0.0)).exp()
    share = share.where(~empty, 0.0).clamp(max=1.0)
    if target_output is not None and target_logsumexp is not None:
        change = ((1 - keep) * share)[..., None] * (target_output.to(sums) - source_output.to(sums))
        changed = output.to(sums) + change
        rows = target_logsumexp != -torch.inf
    else:
        rows = share < 1
        others = (1 - keep * share) / (1 - share.where(rows, 0.0))
        changed = others[..., None] * output.to(sums) + ((keep - others) * share)[..., None] * source_output.to(sums)
    rows = rows if where is None else rows & where
    return changed.to(output.dtype).where(rows[..., None], output)


def _check(name: str, x: Tensor, like: Tensor) -> None:
    _arguments.tensors(**{name: x})
    if x.dim() != 4:
        _arguments.refuse(name, "(batch, heads, length, value_dim)", x)
    if (x.shape, x.dtype, x.device) != (like.shape, like.dtype, like.device):
        raise RuntimeError(
            f"{name}: expected {like.dtype} of shape {tuple(like.shape)} on {like.device}, got {x.dtype} of shape "
            f"{tuple(x.shape)} on {x.device}"
        )


def _check_logsumexp(name: str, x: Tensor, output: Tensor) -> None:
    _arguments.tensors(**{name: x})
    dtype = torch.float64 if output.dtype == torch.float64 else torch.float32
    if (x.shape, x.dtype, x.device) != (output.shape[:3], dtype, output.device):
        raise RuntimeError(
            f"{name}: expected {dtype} of shape {tuple(output.shape[:3])} on {output.device}, got {x.dtype} of shape "
            f"{tuple(x.shape)} on {x.device}"
        )
