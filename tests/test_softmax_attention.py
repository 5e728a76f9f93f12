"""Softmax attention against its definition in float64: shapes, masks, ALiBi, logsumexp, huge logits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import attnx
from attnx import reference
from attnx.testing import assert_close, eager_softmax_attention
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
from compare import Attention, check, forward_backward


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


@pytest.mark.parametrize("head_dim", [128, 256])
@pytest.mark.parametrize("dtype", [torch.float32], ids=str)
def test_long_contractions_are_sums_of_shorter_ones(head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    """One running sum over head_dim has a root mean square error of 0.96 to 1.2 times plain PyTorch's."""
    inputs, grad_output = random_inputs(Shape(length_q=256, length_k=256, head_dim=head_dim, heads=4), dtype, device)
    exact = forward_backward(
        reference.softmax_attention, {name: x.double() for name, x in inputs.items()}, grad_output.double()
    )
    actual = forward_backward(attnx.softmax_attention, inputs, grad_output)
    eager = forward_backward(eager_softmax_attention, inputs, grad_output)
    for name, expected in exact.items():
        error, allowed = ((x[name].double() - expected).square().mean().sqrt() for x in (actual, eager))
        assert error < 0.96 * allowed, name


@pytest.mark.parametrize("mask", ["full", "window_causal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", FEW_SHAPES, ids=str)
def test_instruction_sets(
    shape: Shape, dtype: torch.dtype, mask: str, instruction_set: str | None, device: torch.device
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
    visible = visible_pairs(shape, **MASKS[mask]).to(device)
    baseline = logits.where(visible, -math.inf).logsumexp(-1)
    assert_close(actual, expected, baseline, name="logsumexp")


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logsumexp_is_differentiable(dtype: torch.dtype, mask: str, device: torch.device) -> None:
    inputs, grad_output = random_inputs(Shape(length_k=20), dtype, device)
    seen = visible_pairs(Shape(length_k=20), **MASKS[mask]).any(-1).to(device)

    def gradients(attention: Attention, precision: torch.dtype) -> dict[str, Tensor]:
        def loss(**leaves: Tensor) -> Tensor:
            output, logsumexp = attention(**leaves, return_logsumexp=True, **MASKS[mask])
            return (output * grad_output).double().sum() + logsumexp[..., seen].double().sin().sum()

        one = torch.ones((), dtype=torch.float64, device=device)
        return forward_backward(loss, {name: x.to(precision) for name, x in inputs.items()}, one)

    actual = gradients(attnx.softmax_attention, dtype)
    for name, want in gradients(reference.softmax_attention, torch.float64).items():
        rounding = 4 * torch.finfo(dtype).eps * max(1.0, want.abs().max().item())
        torch.testing.assert_close(actual[name].double(), want, rtol=rounding, atol=rounding, msg=name)


def test_any_strides_of_the_gradient_of_logsumexp(
    dtype: torch.dtype, device: torch.device, deterministic: None
) -> None:
    """Autograd chooses them: sum().backward() sends stride 0."""
    inputs, _ = random_inputs(Shape(heads=4, kv_heads=2), dtype, device)

    def logsumexp(**leaves: Tensor) -> Tensor:
        return attnx.softmax_attention(**leaves, return_logsumexp=True)[1]

    ones = torch.ones(1, 4, 33, dtype=parameter_dtype(dtype), device=device)
    expected = forward_backward(logsumexp, inputs, ones)
    for strided in (ones[:, :, :1].expand_as(ones), ones.mT.contiguous().mT):
        actual = forward_backward(logsumexp, inputs, strided)
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("scale", [0.75, 64.0])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_huge_logits(
    dtype: torch.dtype, is_causal: bool, scale: float, instruction_set: str | None, device: torch.device
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


def test_constant_shift_of_all_logits_changes_nothing(dtype: torch.dtype, device: torch.device) -> None:
    """One more feature, constant over the keys, adds the same 300 to every logit of a row."""
    inputs, _ = random_inputs(Shape(), dtype, device)
    plain = attnx.softmax_attention(**inputs, scale=1.0)
    one = torch.ones_like(inputs["query"][..., :1])
    query, key = torch.cat([inputs["query"], 300 * one], -1), torch.cat([inputs["key"], one], -1)
    shifted = attnx.softmax_attention(query, key, inputs["value"], scale=1.0)
    # Logits near 300 are rounded to 2^-15, and so are the weights, or to what their dtype holds.
    torch.testing.assert_close(shifted, plain, atol=max(1e-3, 4 * torch.finfo(dtype).eps), rtol=0)


def test_row_without_keys_gives_zero(dtype: torch.dtype, device: torch.device) -> None:
    inputs, _ = random_inputs(Shape(length_q=9, length_k=4), dtype, device)
    output, logsumexp = attnx.softmax_attention(**inputs, is_causal=True, return_logsumexp=True)
    assert (output[:, :, :5] == 0).all()
    assert (output[:, :, 5:] != 0).all()
    assert logsumexp[:, :, :5].isneginf().all()
    assert logsumexp[:, :, 5:].isfinite().all()
