"""How results are compared: against float64, within what plain PyTorch loses to rounding in the same dtype.

:func:`assert_close` is the rule; the ``eager_`` functions are the plain PyTorch computations it takes as its yardstick.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnx.functional import SigmoidBias, Window

__all__ = ["assert_close", "eager_attention", "eager_sigmoid_attention", "eager_softmax_attention"]


def assert_close(
    actual: Tensor,
    expected: Tensor,
    baseline: Tensor,
    *,
    factor: float = 2.0,
    floor: float | None = None,
    terms: Tensor | None = None,
    dtype: torch.dtype | None = None,
    name: str = "output",
) -> None:
    """Asserts that ``actual`` is about as close to the truth as plain PyTorch is in the same dtype.

    The largest and the root-mean-square error may each be ``factor`` times that of ``baseline``, plus ``floor``
    units of rounding (epsilon of the dtype) of the largest, and of the root-mean-square, value expected.
    NaN, +inf and -inf must stand exactly where they are expected.

    Args:
        actual: the result to judge.
        expected: the truth in float64, of the same shape.
        baseline: the plain PyTorch result in the dtype under test, of the same shape; where it is not finite (a
            sum that overflows in float16) it says nothing and is left out.
        factor: how many times the error of the baseline is allowed.
        floor: units of rounding allowed on top, for where the baseline happens to be exact; by default 2 in 16 bits,
            8 in float32, in which the sums themselves are kept, and 16 in float64, where the truth is rounded, too.
        terms: where ``expected`` is a difference of larger terms that may cancel, those terms; rounding is then
            counted in units of their size, if that is the larger.
        dtype: the dtype under test, where it is not that of ``actual``: a float32 gradient of bfloat16 inputs.
        name: what to call the tensor in the message.

    Raises:
        AssertionError: with the name, the error, what was allowed, the index and the values there.
    """
    for other, what in ((expected, "expected"), (baseline, "baseline")):
        if actual.shape != other.shape:
            raise AssertionError(f"{name}: shape {tuple(actual.shape)}, but {what} has {tuple(other.shape)}")
    got, want, plain = (x.detach().double().cpu() for x in (actual, expected, baseline))
    _assert_same_positions(got, want, name)

    finite = want.isfinite()
    if not finite.any():
        return
    plain_error = (plain - want)[finite & plain.isfinite()]
    sizes = [x[finite] for x in ([want] if terms is None else [want, terms.detach().double().cpu()])]
    precision = torch.finfo(dtype or actual.dtype)
    if floor is None:
        floor = {16: 2.0, 32: 8.0, 64: 16.0}[precision.bits]
    rounding = floor * precision.eps
    error = (got - want).abs().where(finite, 0.0)
    for norm, measure in (("largest", _largest), ("root-mean-square", _root_mean_square)):
        yardstick = measure(plain_error)
        allowed = factor * yardstick + rounding * max(map(measure, sizes))
        if (measured := measure(error[finite])) > allowed:
            raise AssertionError(
                f"{name} ({actual.dtype}): {norm} error {measured:.3g}, allowed {allowed:.3g} "
                f"({factor:g} x {yardstick:.3g} of plain PyTorch + {floor:g} units of rounding); "
                f"worst at {_describe(got, want, int(error.argmax()))}"
            )


def _assert_same_positions(got: Tensor, want: Tensor, name: str) -> None:
    for kind, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = test(got) != test(want)
        if wrong.any():
            first = int(wrong.flatten().int().argmax())
            raise AssertionError(
                f"{name}: {kind} at {int(test(got).sum())} places, expected at {int(test(want).sum())}; "
                f"{int(wrong.sum())} differ, the first at {_describe(got, want, first)}"
            )


def _describe(got: Tensor, want: Tensor, flat_index: int) -> str:
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat_index), got.shape))
    return f"{index}: got {got[index].item():.9g}, expected {want[index].item():.9g}"


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def _root_mean_square(x: Tensor) -> float:
    return x.square().mean().sqrt().item() if x.numel() else 0.0


def eager_attention(
    weigh: Callable[[Tensor, Tensor], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    window: Window = None,
    position_offset: int = 0,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Attention in plain PyTorch, every step rounded to the dtype of ``query``.

    Every sum runs from the last term to the first: in float64, where the reference is rounded as well, only another
    order of the sums tells how much.

    Args:
        weigh: makes the weights of the logits and of which of them are visible, both (..., length_q, length_k).
        query, key, value, scale, is_causal, window, position_offset: as in :func:`attnx.sigmoid_attention`.
        alibi_slopes: the same, or (heads, length_q), which tells the gradient of each row apart.
    """
    groups = query.shape[1] // key.shape[1]
    query, key, value = query.flip(2, 3), key.flip(2, 3), value.flip(2)
    left, right = (-1 if bound is None else bound for bound in window or (-1, -1))
    if is_causal:
        right = 0
    # Counted from the ends, which meet without an offset, key j lies i - j places after query i.
    after = torch.arange(query.shape[2], device=query.device)[:, None] - torch.arange(key.shape[2], device=query.device)
    after = after - position_offset
    visible = torch.ones_like(after, dtype=torch.bool)
    if left >= 0:
        visible &= after >= -left
    if right >= 0:
        visible &= after <= right
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else scale
    logits = query @ (key * scale).repeat_interleave(groups, dim=1).mT
    if alibi_slopes is not None:
        logits = logits - parameter_at_logits(alibi_slopes, query) * after.abs().to(query.dtype)
    weights = weigh(logits, visible).masked_fill(~visible, 0.0)
    return (weights @ value.repeat_interleave(groups, dim=1)).flip(2)


def parameter_at_logits(x: Tensor, query: Tensor) -> Tensor:
    """A bias, or slopes, of shape (), (heads,) or (heads, length_q), as it meets the logits."""
    x = x.to(query.dtype)
    return x.flip(-1)[..., None] if x.dim() == 2 else x.expand(query.shape[1])[:, None, None]


def eager_sigmoid_attention(
    query: Tensor, key: Tensor, value: Tensor, *, bias: SigmoidBias = None, **options: Any
) -> Tensor:
    """:func:`attnx.sigmoid_attention` by :func:`eager_attention`; ``bias``, too, may be (heads, length_q)."""

    def weigh(logits: Tensor, visible: Tensor) -> Tensor:
        if bias is None:
            return (logits - math.log(max(key.shape[2], 1))).sigmoid()
        if isinstance(bias, Tensor):
            return (logits + parameter_at_logits(bias, query)).sigmoid()
        if bias == "row":
            return (logits - visible.sum(-1, keepdim=True).clamp(min=1).to(query.dtype).log()).sigmoid()
        return (logits + bias).sigmoid()

    return eager_attention(weigh, query, key, value, **options)


def eager_softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, *, sink: Tensor | None = None, **options: Any
) -> Tensor:
    """:func:`attnx.softmax_attention` by :func:`eager_attention`; ``sink``, too, may be (heads, length_q)."""

    def weigh(logits: Tensor, visible: Tensor) -> Tensor:
        # The smallest number instead of -inf keeps a row that sees no key, and its gradients, free of NaN.
        logits = logits.masked_fill(~visible, torch.finfo(logits.dtype).min)
        if sink is None:
            return logits.softmax(-1)
        sinks = parameter_at_logits(sink, query).expand(*logits.shape[:-1], 1)
        return torch.cat([logits, sinks], -1).softmax(-1)[..., :-1]

    return eager_attention(weigh, query, key, value, **options)
