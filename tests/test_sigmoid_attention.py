"""Sigmoid attention against its definition in float64: shapes, masks, bias, ALiBi; and the accuracy of each weight."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import attnx
from cases import DTYPES, FEW_SHAPES, MASKS, SHAPES, Shape, random_inputs, random_parameter
from compare import check

BIASES = ["length", "row", "float", "scalar_tensor", "tensor_per_head"]


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: Shape, dtype: torch.dtype, is_causal: bool, device: torch.device) -> None:
    check("sigmoid_attention", *random_inputs(shape, dtype, device), is_causal=is_causal)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", FEW_SHAPES, ids=str)
def test_masks(shape: Shape, dtype: torch.dtype, mask: str, device: torch.device) -> None:
    check("sigmoid_attention", *random_inputs(shape, dtype, device), bias="row", **MASKS[mask])


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("slopes", [None, "scalar", "per_head"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", FEW_SHAPES, ids=str)
def test_bias_and_alibi(shape: Shape, dtype: torch.dtype, slopes: str | None, bias: str, device: torch.device) -> None:
    inputs, grad_output = random_inputs(shape, dtype, device)
    options: dict[str, Any] = {"is_causal": slopes == "per_head"}
    if "tensor" in bias:
        inputs["bias"] = random_parameter((shape.heads,) if bias == "tensor_per_head" else (), dtype, device) - 3
    else:
        options["bias"] = {"length": None, "row": "row", "float": -2.5}[bias]
    if slopes:
        inputs["alibi_slopes"] = random_parameter((shape.heads,) if slopes == "per_head" else (), dtype, device, seed=2)
    check("sigmoid_attention", inputs, grad_output, **options)


@pytest.mark.parametrize("mask", ["full", "window_causal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", FEW_SHAPES, ids=str)
def test_instruction_sets(
    shape: Shape, dtype: torch.dtype, mask: str, instruction_set: str | None, device: torch.device
) -> None:
    inputs, grad_output = random_inputs(shape, dtype, device)
    inputs["bias"] = random_parameter((shape.heads,), dtype, device) - 3
    inputs["alibi_slopes"] = random_parameter((shape.heads,), dtype, device, seed=2)
    check("sigmoid_attention", inputs, grad_output, **MASKS[mask])


@pytest.mark.parametrize("scale", [0.0, -0.3, 2.0])
def test_scale(scale: float, dtype: torch.dtype, device: torch.device) -> None:
    check("sigmoid_attention", *random_inputs(Shape(), dtype, device), scale=scale)


def test_row_without_keys_gives_zero(dtype: torch.dtype, device: torch.device) -> None:
    inputs, _ = random_inputs(Shape(length_q=9, length_k=4), dtype, device)
    output = attnx.sigmoid_attention(**inputs, is_causal=True, bias="row")
    assert (output[:, :, :5] == 0).all()
    assert (output[:, :, 5:] != 0).all()


def _representable_logits(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """All numbers of at most 15 in magnitude, as (chunks, 256); of float32 those of bfloat16 with random lower bits."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    if dtype == torch.float32:
        generator = torch.Generator().manual_seed(0)
        logits = ((bits << 16) | torch.randint(2**16, bits.shape, generator=generator, dtype=torch.int32)).view(dtype)
    else:
        logits = bits.to(torch.int16).view(dtype)
    logits = logits[logits.abs() <= 15]
    return logits[: logits.numel() // 256 * 256].view(-1, 256).to(device)


# float16 has no small numbers: its weights are seen a thousand times as large.
@pytest.mark.parametrize(
    ("dtype", "bound", "value"),
    [(torch.bfloat16, 2**-7, 1.0), (torch.float16, 2**-7, 1024.0), (torch.float32, 2**-20, 1.0)],
    ids=str,
)
def test_relative_error_of_each_weight(
    dtype: torch.dtype, bound: float, value: float, instruction_set: str | None, device: torch.device
) -> None:
    logits = _representable_logits(dtype, device)
    truth = logits.double().sigmoid() * value
    options: dict[str, Any] = {"bias": 0.0, "scale": 1.0}
    one = torch.ones((), dtype=dtype, device=device)

    # 256 keys a row, told apart by a value that is the identity: the weights, from full tiles.
    chunks = logits.shape[0]
    identity = value * torch.eye(256, dtype=dtype, device=device).expand(chunks, 1, 256, 256)
    weights = attnx.sigmoid_attention(one.expand(chunks, 1, 1, 1), logits[:, None, :, None], identity, **options)
    assert ((weights[:, 0, 0].double() - truth) / truth).abs().max() < bound

    # One key a row: what is left over after the full tiles.
    weights = attnx.sigmoid_attention(
        logits.view(1, 1, -1, 1), one.expand(1, 1, 1, 1), value * one.expand(1, 1, 1, 1), **options
    )
    assert ((weights.view_as(truth).double() - truth) / truth).abs().max() < bound


@pytest.mark.parametrize("logit", [-1e4, -200.0, -90.0, 90.0, 200.0, 1e4])
def test_saturated_weights(logit: float, instruction_set: str | None, dtype: torch.dtype, device: torch.device) -> None:
    ones = torch.ones(1, 1, 64, 16, dtype=dtype, device=device)
    output = attnx.sigmoid_attention(ones, ones, ones, bias=logit, scale=0.0)
    expected = torch.full_like(output, 64 / (1 + math.exp(min(-logit, 700))))
    torch.testing.assert_close(output, expected, atol=1e-30, rtol=max(1e-5, torch.finfo(dtype).eps))
