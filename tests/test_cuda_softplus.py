"""Softplus attention on CUDA, by the mainloop for 8.0: shapes, masks, packed sequences, few rows, determinism."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import attnx
from attnx import reference
from cases import MASKS, Shape, pack, random_inputs, visible_pairs
from compare import forward_backward
from test_softplus import SHAPES, check

pytestmark = pytest.mark.backends("cuda", "emulated")

DTYPES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_definition(shape: Shape, dtype: torch.dtype, mask: str, device: torch.device) -> None:
    check(*random_inputs(shape, dtype, device), **MASKS[mask])


@pytest.mark.parametrize("has_padding", [False, True])
def test_packed(has_padding: bool, dtype: torch.dtype, device: torch.device) -> None:
    inputs, grad_output, sizes = pack(([3, 0, 70, 1], [4, 2, 90, 0]), dtype, device)
    if has_padding:
        inputs = {name: torch.cat([x, torch.full_like(x[:5], 7.0)]) for name, x in inputs.items()}
        grad_output = torch.cat([grad_output, torch.ones_like(grad_output[:5])])
    check(inputs, grad_output, "softplus_attention_varlen", is_causal=True, has_padding=has_padding, **sizes)


def test_lengths_of_keys(dtype: torch.dtype, device: torch.device) -> None:
    inputs, grad_output = random_inputs(Shape(length_q=30, length_k=120, batch=3, heads=4, kv_heads=2), dtype, device)
    used = {"seqused_k": torch.tensor([120, 0, 37]).int(), "leftpad_k": torch.tensor([5, 0, 31]).int()}
    check(inputs, grad_output, is_causal=True, **{name: x.to(device) for name, x in used.items()})


def test_few_rows_over_many_keys(dtype: torch.dtype, device: torch.device) -> None:
    """The keys are cut into parts, which merge by ln Z."""
    check(*random_inputs(Shape(length_q=2, length_k=3000, head_dim=64), dtype, device))


@pytest.mark.parametrize("mask", MASKS)
def test_logsumexp(mask: str, dtype: torch.dtype, device: torch.device) -> None:
    shape = Shape(length_q=20, length_k=33, heads=4, kv_heads=2)
    inputs, _ = random_inputs(shape, dtype, device)
    _, actual = attnx.softplus_attention(**inputs, return_logsumexp=True, **MASKS[mask])
    _, expected = reference.softplus_attention(**inputs, return_logsumexp=True, **MASKS[mask])
    hidden = ~visible_pairs(shape, **MASKS[mask]).any(-1).expand_as(actual.cpu())
    assert torch.equal(actual.isneginf().cpu(), hidden)
    finite = expected.isfinite()
    tolerance = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(actual[finite].double(), expected[finite], rtol=0, atol=tolerance)


def test_logits_that_are_large(dtype: torch.dtype, device: torch.device) -> None:
    """Softplus is its logit there, and 0 at the other end."""
    inputs, grad_output = random_inputs(Shape(length_q=40, length_k=70, head_dim=64), dtype, device)
    check(inputs, grad_output, scale=9.0)


def test_deterministic_backward_repeats_its_bits(dtype: torch.dtype, device: torch.device) -> None:
    inputs, grad_output = random_inputs(Shape(length_q=150, length_k=260, head_dim=64), dtype, device)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (forward_backward(attnx.softplus_attention, inputs, grad_output) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_hidden_key_that_is_no_number_shows_in_no_weight(dtype: torch.dtype, device: torch.device) -> None:
    inputs, _ = random_inputs(Shape(length_q=40, length_k=50), dtype, device)
    options: dict[str, Any] = {"window": (4, 2)}
    expected = attnx.softplus_attention(**inputs, **options)
    inputs["key"][:, :, :4] = math.nan  # the first query sees keys from 6 on
    assert torch.equal(attnx.softplus_attention(**inputs, **options), expected)


def test_the_sharpened_form_is_refused(dtype: torch.dtype, device: torch.device) -> None:
    inputs, _ = random_inputs(Shape(), dtype, device)
    if device.type != "cuda":
        pytest.skip("tensors on the host run the CPU's kernel of an operator that has none on CUDA")
    with pytest.raises(RuntimeError, match="sharpened_softplus_attention: expected tensors on cpu"):
        attnx.softplus_attention(**inputs, sharpen=3)
