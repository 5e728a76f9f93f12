"""Terms of logits as tests draw them, and how calls with them are compared."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import attnx
from attnx import reference
from attnx.testing import assert_close
from backends import Backend
from cases import Shape, parameter_dtype
from compare import forward_backward

GRADIENTS = ("attn_mask", "key_bias", "key_mask")


def generator(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw_term(
    name: str, shape: Shape, dtype: torch.dtype, device: torch.device, served: str = "each", seed: int = 5
) -> Any:
    """The argument of a name; ``served`` says whether each sequence and head has its own, or which share one."""
    batch = 1 if served in ("sequences", "all") else shape.batch
    heads = 1 if served in ("heads", "all") else shape.heads
    length_q = 1 if served == "rows" else shape.length_q
    pairs, keys = (batch, heads, length_q, shape.length_k), (batch, heads, shape.length_k)
    kind = parameter_dtype(dtype)
    if name == "softcap":
        return 0.8
    if name == "bool_mask":
        return (torch.rand(pairs, generator=generator()) < 0.7).to(device)
    if name == "input_mask":
        return torch.randn(pairs, generator=generator()).to(device, dtype)
    if name == "attn_mask":
        mask = torch.randn(pairs, generator=generator())
        return mask.where(torch.rand(pairs, generator=generator(6)) < 0.8, -math.inf).to(device, kind)
    if name == "row_bounds":
        ends = torch.randint(-9, shape.length_k + 9, (batch, heads, length_q, 2), generator=generator(seed))
        return ends.sort(-1).values.to(device, torch.int32)
    if name == "key_bias":
        return torch.randn(keys, generator=generator()).to(device, kind)
    if name == "key_mask":
        share = torch.rand(keys, generator=generator())
        return share.where(share > 0.2, 0.0).where(share < 0.8, 1.0).to(device, kind)
    return 0.3


def terms_of(names: tuple[str, ...], *args: Any) -> dict[str, Any]:
    terms: dict[str, Any] = {}
    for name in names:
        argument = {"bool_mask": "attn_mask", "input_mask": "attn_mask", "dropout": "dropout_p"}.get(name, name)
        terms[argument] = draw_term(name, *args)
    if "dropout_p" in terms:
        terms |= {"seed": 11, "offset": 3}
    return terms


def within(row_bounds: Tensor, length_k: int) -> Tensor:
    """The mask of pairs that bounds stand for."""
    j = torch.arange(length_k, device=row_bounds.device)
    return (j >= row_bounds[..., :1]) & (j < row_bounds[..., 1:])


def needs(backend: Backend, names: tuple[str, ...], gradients: bool = True) -> None:
    """Skips what the capability table does not have on the backend."""
    for name in names:
        feature = {"bool_mask": "attn_mask", "input_mask": "attn_mask"}.get(name, name)
        wanted = [feature, f"{feature}_gradient"] if gradients and feature in GRADIENTS else [feature]
        for need in wanted:
            if (reason := backend.missing(need)) and not (name == "bool_mask" and need.endswith("_gradient")):
                pytest.skip(reason)


def eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    score: str,
    scale: float | None = None,
    is_causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    sink: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    attn_mask: Tensor | None = None,
    row_bounds: Tensor | None = None,
    key_bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    constant_sums: bool = False,
    **draw: Any,
) -> Tensor:
    """Plain PyTorch, every step rounded to the dtype of ``query``; sums run from the last term to the first.

    With ``constant_sums`` the gradient leaves the sums of weights out: it shows how large the terms are that cancel.
    """
    dtype, groups = query.dtype, query.shape[1] // key.shape[1]
    distance = torch.arange(query.shape[2])[:, None] + key.shape[2] - query.shape[2] - torch.arange(key.shape[2])
    visible = reference._visible(distance, is_causal, window).to(query.device)
    scale = query.shape[3] ** -0.5 if scale is None else scale
    logits = query.flip(-1) @ (key.flip(-1) * scale).repeat_interleave(groups, 1).mT
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    if score == "sigmoid":
        logits = logits - math.log(key.shape[2])
    if alibi_slopes is not None:
        logits = logits - alibi_slopes.to(dtype)[:, None, None] * distance.abs().to(query.device, dtype)
    if row_bounds is not None:
        visible = visible & within(row_bounds, key.shape[2])
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        visible = visible & attn_mask
    elif attn_mask is not None:
        logits = logits + attn_mask.to(dtype)
    if key_bias is not None:
        logits = logits + key_bias[:, :, None].to(dtype)
    share = 1.0 if key_mask is None else key_mask[:, :, None].to(dtype)
    logits = logits.masked_fill(~visible, -math.inf)
    if score == "sigmoid":
        weights = logits.sigmoid() * share
    else:
        counted = logits if key_mask is None else logits.masked_fill(key_mask[:, :, None] == 0, -math.inf)
        most = counted.amax(-1, keepdim=True).detach()
        if sink is None:  # a row in which no key counts has no weights
            logits = logits.masked_fill(most == -math.inf, -math.inf)
        most = most.clamp(min=-1e4)
        if sink is not None:
            most = most.maximum(sink.detach().to(dtype)[:, None, None])
        weights = (logits - most).exp() * share
        total = weights.flip(-1).sum(-1, keepdim=True)
        total = total.detach() if constant_sums else total
        if sink is not None:
            total = total + (sink.to(dtype)[:, None, None] - most).exp()
        weights = weights / total.where(total > 0, 1.0)
    if draw.get("dropout_p"):
        factors = reference.dropout_factors(weights.shape, draw["dropout_p"], draw["seed"], draw["offset"])
        weights = weights * factors.to(query.device, dtype)
    return weights.flip(-1) @ value.repeat_interleave(groups, 1).flip(2)


def check(
    operator: str, inputs: dict[str, Tensor], grad_output: Tensor, floor: float | None = None, **options: Any
) -> dict[str, Tensor]:
    """Holds the output and the gradients of inputs and terms against float64."""
    in_sums = {name: x for name, x in options.items() if isinstance(x, Tensor) and x.is_floating_point()}
    others = {name: x for name, x in options.items() if name not in in_sums}
    leaves = inputs | in_sums
    results = forward_backward(getattr(attnx, operator), leaves, grad_output, **others)
    exact = {name: x.double() for name, x in leaves.items()}, grad_output.double()
    expected = forward_backward(getattr(reference, operator), *exact, **others)
    score = operator.split("_")[0]
    baseline = forward_backward(eager, leaves, grad_output, score=score, **others)
    terms = forward_backward(eager, *exact, score=score, constant_sums=True, **others)
    for name, actual in results.items():
        like = leaves.get(name.removeprefix("grad_"), grad_output)
        assert (actual.dtype, actual.shape) == (like.dtype, like.shape), name
        sizes = terms[name] if name.startswith("grad_") else None
        assert_close(
            actual, expected[name], baseline[name], terms=sizes, name=name, dtype=grad_output.dtype, floor=floor
        )
    return results
