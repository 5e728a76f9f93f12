"""Softplus attention on CUDA, by the mainloop that a device chooses: shapes, masks, packed sequences, determinism."""

from __future__ import annotations

import functools
import math

import pytest
import torch

import attnx
from attnx import reference
from cases import MASKS, Shape, pack, random_inputs, visible_pairs
from compare import forward_backward
from test_softplus import POWERS, SHAPES, check

pytestmark = pytest.mark.backends("cuda", "emulated")

DTYPES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sharpen", POWERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_definition(shape: Shape, sharpen: int | None, dtype: torch.dtype, mask: str, device: torch.device) -> None:
    check(*random_inputs(shape, dtype, device), sharpen=sharpen, **MASKS[mask])


@pytest.mark.parametrize("has_padding", [False, True])
@pytest.mark.parametrize("sharpen", [None, 3])
def test_packed(sharpen: int | None, has_padding: bool, dtype: torch.dtype, device: torch.device) -> None:
    inputs, grad_output, sizes = pack(([3, 0, 70, 1], [4, 2, 90, 0]), dtype, device)
    if has_padding:
        inputs = {name: torch.cat([x, torch.full_like(x[:5], 7.0)]) for name, x in inputs.items()}
        grad_output = torch.cat([grad_output, torch.ones_like(grad_output[:5])])
    check(
        inputs,
        grad_output,
        "softplus_attention_varlen",
        is_causal=True,
        has_padding=has_padding,
        sharpen=sharpen,
        **sizes,
    )


@pytest.mark.parametrize("sharpen", [None, 3])
def test_lengths_of_keys(sharpen: int | None, dtype: torch.dtype, device: torch.device) -> None:
    inputs, grad_output = random_inputs(Shape(length_q=30, length_k=120, batch=3, heads=4, kv_heads=2), dtype, device)
    used = {"seqused_k": torch.tensor([120, 0, 37]).int(), "leftpad_k": torch.tensor([5, 0, 31]).int()}
    check(inputs, grad_output, is_causal=True, sharpen=sharpen, **{name: x.to(device) for name, x in used.items()})


@pytest.mark.parametrize("sharpen", [None, 3])
def test_few_rows_over_many_keys(sharpen: int | None, dtype: torch.dtype, device: torch.device) -> None:
    """The keys are cut into parts, which merge by ln Z, or by the logarithm of the sum of powers."""
    check(*random_inputs(Shape(length_q=2, length_k=3000, head_dim=64), dtype, device), sharpen=sharpen)


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


@pytest.mark.parametrize("sharpen", [None, 3])
def test_logits_that_are_large(sharpen: int | None, dtype: torch.dtype, device: torch.device) -> None:
    """Softplus is its logit there, and 0 at the other end."""
    inputs, grad_output = random_inputs(Shape(length_q=40, length_k=70, head_dim=64), dtype, device)
    check(inputs, grad_output, scale=9.0, sharpen=sharpen)


@pytest.mark.parametrize("sharpen", [None, 3])
def test_deterministic_backward_repeats_its_bits(
    sharpen: int | None, dtype: torch.dtype, device: torch.device, deterministic: None
) -> None:
    inputs, grad_output = random_inputs(Shape(length_q=150, length_k=260, head_dim=64), dtype, device)
    attention = functools.partial(attnx.softplus_attention, sharpen=sharpen)
    first, second = (forward_backward(attention, inputs, grad_output) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("length_q", [1, 40])
def test_rows_of_equal_weights(length_q: int, dtype: torch.dtype, device: torch.device) -> None:
    """No weight is above the mean: 0, and no gradient but in rows of three keys, from which no mean is taken."""
    inputs, grad_output = random_inputs(Shape(length_q=length_q, length_k=300), dtype, device)
    inputs["key"] = inputs["key"][:, :, :1].expand_as(inputs["key"]).contiguous()
    results = forward_backward(attnx.softplus_attention, inputs, grad_output, sharpen=15)
    assert all((x == 0).all() for x in results.values())
    mean = attnx.softplus_attention(**inputs, sharpen=15, window=(2, 0))
    expected = inputs["value"].double().unfold(2, 3, 1).mean(-1)[:, :, -length_q:]
    torch.testing.assert_close(mean.double(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("sharpen", [3, 15])
def test_tiles_without_a_weight(sharpen: int, dtype: torch.dtype, device: torch.device) -> None:
    """Keys that point away weigh nothing: the tensor cores do not see their values."""
    inputs, _ = random_inputs(Shape(length_q=70, length_k=600, head_dim=64), dtype, device)
    inputs["query"][..., 0], inputs["key"][..., 0] = 40.0, 40.0
    inputs["key"][:, :, 128:512, 0] = -40.0
    expected = reference.softplus_attention(**inputs, sharpen=sharpen)
    inputs["value"][:, :, 256:384] = math.nan
    actual = attnx.softplus_attention(**inputs, sharpen=sharpen)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=sharpen * 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("sharpen", [None, 3])
def test_explain_names_the_mainloop(sharpen: int | None, dtype: torch.dtype, device: torch.device) -> None:
    """The plain form's is that of softmax."""
    inputs, _ = random_inputs(Shape(length_q=128, length_k=128, head_dim=64), dtype, device)
    softmax = str(attnx.explain(attnx.softmax_attention, **inputs).kernel)
    expected = softmax.replace("softmax", "softplus") if sharpen is None else "sharpened_softplus_attention [sm80]"
    assert attnx.explain(attnx.softplus_attention, **inputs, sharpen=sharpen).kernel == expected
