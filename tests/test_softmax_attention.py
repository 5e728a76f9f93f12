"""Softmax attention against its definition in float64: shapes, masks, ALiBi, logsumexp, huge logits."""

from __future__ import annotations

import math

import pytest
import torch

import attnx
from attnx import reference
from attnx.testing import assert_close
from cases import (
    DTYPES,
    FEW_SHAPES,
    MASKS,
    SHAPES,
    Shape,
    parameter_dtype,
    random_inputs,
    random_parameter,
    visible_pairs,
)
from compare import check


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: Shape, dtype: torch.dtype, is_causal: bool, device: torch.device) -> None:
    check("softmax_attention", *random_inputs(shape, dtype, device), is_causal=is_causal)


@pytest.mark.parametrize("slopes", [None, "scalar", "per_head"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", FEW_SHAPES, ids=str)
def test_masks_and_alibi(shape: Shape, dtype: torch.dtype, mask: str, slopes: str | None, device: torch.device) -> None:
    inputs, grad_output = random_inputs(shape, dtype, device)
    if slopes:
        inputs["alibi_slopes"] = random_parameter((shape.heads,) if slopes == "per_head" else (), dtype, device)
    check("softmax_attention", inputs, grad_output, **MASKS[mask])


@pytest.mark.parametrize("mask", ["full", "window_causal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", FEW_SHAPES, ids=str)
def test_instruction_sets(
    shape: Shape, dtype: torch.dtype, mask: str, instruction_set: str, device: torch.device
) -> None:
    inputs, grad_output = random_inputs(shape, dtype, device)
    inputs["alibi_slopes"] = random_parameter((shape.heads,), dtype, device)
    check("softmax_attention", inputs, grad_output, **MASKS[mask])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", FEW_SHAPES, ids=str)
def test_logsumexp(shape: Shape, dtype: torch.dtype, mask: str, device: torch.device) -> None:
    inputs, _ = random_inputs(shape, dtype, device)
    _, actual = attnx.softmax_attention(**inputs, return_logsumexp=True, **MASKS[mask])
    assert (actual.dtype, actual.shape) == (parameter_dtype(dtype), shape.query()[:3])
    _, expected = reference.softmax_attention(**inputs, return_logsumexp=True, **MASKS[mask])
    # Inputs as they are, all arithmetic in the dtype of the logsumexp: the rounding of the inputs is no excuse.
    query, key = inputs["query"].to(actual.dtype), inputs["key"].to(actual.dtype)
    logits = query * shape.head_dim**-0.5 @ key.repeat_interleave(shape.heads // key.shape[1], dim=1).mT
    baseline = logits.where(visible_pairs(shape, **MASKS[mask]), -math.inf).logsumexp(-1)
    assert_close(actual, expected, baseline, name="logsumexp")


@pytest.mark.parametrize("mask", MASKS)
def test_logsumexp_is_differentiable(mask: str, device: torch.device) -> None:
    inputs, grad_output = random_inputs(Shape(length_k=20), torch.float64, device)
    leaves = [x.requires_grad_() for x in inputs.values()]
    seen = visible_pairs(Shape(length_k=20), **MASKS[mask]).any(-1).to(device)
    gradients = []
    for attention in (attnx.softmax_attention, reference.softmax_attention):
        output, logsumexp = attention(*leaves, return_logsumexp=True, **MASKS[mask])
        loss = (output * grad_output).sum() + logsumexp[..., seen].sin().sum()
        gradients.append(torch.autograd.grad(loss, leaves))
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [0.75, 64.0])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_huge_logits(
    dtype: torch.dtype, is_causal: bool, scale: float, instruction_set: str, device: torch.device
) -> None:
    """Logits of hundreds and thousands, whose exp overflows in every dtype. They are exact, so the weights must be."""
    inputs, grad_output = random_inputs(Shape(length_k=70), dtype, device)
    for name in ("query", "key"):
        inputs[name] = (2 * inputs[name]).round()
    _, logsumexp = reference.softmax_attention(**inputs, scale=scale, is_causal=is_causal, return_logsumexp=True)
    # The backward takes its weights from the logsumexp, whose rounding grows with its size.
    own_rounding = torch.finfo(parameter_dtype(dtype)).eps / torch.finfo(dtype).eps
    floor = 16 + logsumexp.max().item() * own_rounding
    check("softmax_attention", inputs, grad_output, gradient_floor=floor, scale=scale, is_causal=is_causal)


def test_constant_shift_of_all_logits_changes_nothing(device: torch.device) -> None:
    """One more feature, constant over the keys, adds the same 300 to every logit of a row."""
    inputs, _ = random_inputs(Shape(), torch.float32, device)
    plain = attnx.softmax_attention(**inputs, scale=1.0)
    one = torch.ones_like(inputs["query"][..., :1])
    query, key = torch.cat([inputs["query"], 300 * one], -1), torch.cat([inputs["key"], one], -1)
    shifted = attnx.softmax_attention(query, key, inputs["value"], scale=1.0)
    torch.testing.assert_close(shifted, plain, atol=1e-3, rtol=0)  # logits near 300 are rounded to 2^-15


def test_row_without_keys_gives_zero(device: torch.device) -> None:
    inputs, _ = random_inputs(Shape(length_q=9, length_k=4), torch.float32, device)
    output, logsumexp = attnx.softmax_attention(**inputs, is_causal=True, return_logsumexp=True)
    assert (output[:, :, :5] == 0).all()
    assert (output[:, :, 5:] != 0).all()
    assert logsumexp[:, :, :5].isneginf().all()
    assert logsumexp[:, :, 5:].isfinite().all()
