"""Gates on attention's output, and shares of the sum of values."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import attnx
from attnx import reference
from attnx.testing import assert_close, eager_softmax_attention
from cases import DTYPES, MASKS, Shape, parameter_dtype, random_inputs
from compare import forward_backward

SHAPE = Shape(33, 40, 16, 24, batch=2, heads=4, kv_heads=2)


def _rows(dtype: torch.dtype, device: torch.device, shape: tuple[int, ...] = (2, 4, 33)) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {name: torch.randn(shape, dtype=parameter_dtype(dtype)).to(device) for name in ("gate", "addend")}


def _eager(query: Tensor, key: Tensor, value: Tensor, gate: Tensor, addend: Tensor, **options: Any) -> Tensor:
    """The plain computation in the dtype of query, with the mask as a matrix."""
    output = eager_softmax_attention(query, key, value, **options)
    visible = reference.visible_keys(query.shape[2], key.shape[2], query.device, **options).to(value.dtype)
    sums = visible @ value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    return (gate[..., None] * output + addend[..., None] * sums).to(query.dtype)


# Where a row sees one key, the gradients of query and key are differences that leave nothing but rounding.
@pytest.mark.parametrize("mask", [mask for mask in MASKS if mask != "window_diagonal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks(mask: str, dtype: torch.dtype, device: torch.device) -> None:
    inputs, grad_output = random_inputs(SHAPE, dtype, device)
    inputs |= _rows(dtype, device)
    got = forward_backward(attnx.affine_attention, inputs, grad_output, **MASKS[mask])
    exact = {name: x.double() for name, x in inputs.items()}
    want = forward_backward(reference.affine_attention, exact, grad_output.double(), **MASKS[mask])
    plain = forward_backward(_eager, inputs, grad_output, **MASKS[mask])
    for name, x in got.items():
        assert_close(x, want[name], plain[name], name=name, dtype=dtype)


def test_neutral_gate(dtype: torch.dtype, device: torch.device) -> None:
    inputs, _ = random_inputs(SHAPE, dtype, device)
    gate = torch.ones(1, 1, 1, dtype=parameter_dtype(dtype), device=device)
    expected = attnx.softmax_attention(**inputs, is_causal=True)
    assert torch.equal(attnx.affine_attention(**inputs, gate=gate, is_causal=True), expected)
    zero = torch.zeros_like(gate)
    assert torch.equal(attnx.affine_attention(**inputs, gate=gate, addend=zero, is_causal=True), expected)


def test_broadcast_rows(dtype: torch.dtype, device: torch.device) -> None:
    """One number for a head, or for all: gradients are sums over what shares it."""
    inputs, grad_output = random_inputs(SHAPE, dtype, device)
    rows = _rows(dtype, device, (1, 4, 1))
    wide = {name: x.expand(2, 4, 33).clone() for name, x in rows.items()}
    got = forward_backward(attnx.affine_attention, inputs | rows, grad_output, is_causal=True)
    want = forward_backward(attnx.affine_attention, inputs | wide, grad_output, is_causal=True)
    assert torch.equal(got["output"], want["output"])
    for name in rows:
        total = want[f"grad_{name}"].sum((0, 2), keepdim=True)
        assert torch.allclose(got[f"grad_{name}"], total, rtol=1e-4, atol=1e-4)


def test_short_window_over_many_values(dtype: torch.dtype, device: torch.device) -> None:
    """The sums over a window are differences of long sums, of which nothing may be lost."""
    inputs, _ = random_inputs(Shape(3, 20000, 16, heads=1), dtype, device)
    inputs["value"] = inputs["value"] + 100
    rows = {"gate": torch.zeros(1, 1, 3, device=device), "addend": torch.ones(1, 1, 3, device=device)}
    rows = {name: x.to(parameter_dtype(dtype)) for name, x in rows.items()}
    output = attnx.affine_attention(**inputs, **rows, window=(1, 0))
    value = inputs["value"].double()
    expected = torch.stack([value[:, :, i - 1 : i + 1].sum(2) for i in range(19997, 20000)], 2)
    assert_close(output, expected, expected.to(dtype))


@pytest.mark.backends("cpu")
def test_gradients(backend: object) -> None:
    shape = Shape(5, 7, 8, heads=4, kv_heads=2)
    inputs, _ = random_inputs(shape, torch.float64, torch.device("cpu"))
    inputs |= _rows(torch.float64, torch.device("cpu"), (1, 4, 5))
    leaves = [x.requires_grad_() for x in inputs.values()]
    for options in ({}, {"is_causal": True}, {"window": (2, 1)}):
        assert torch.autograd.gradcheck(lambda *x, o=options: attnx.affine_attention(*x, **o), leaves)


@pytest.mark.backends("cpu")
def test_compiled(backend: object) -> None:
    inputs, _ = random_inputs(SHAPE, torch.float32, torch.device("cpu"))
    inputs |= _rows(torch.float32, torch.device("cpu"))
    compiled = torch.compile(attnx.affine_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(**inputs, is_causal=True), attnx.affine_attention(**inputs, is_causal=True))


@pytest.mark.backends("cpu")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": None}, "gate: expected a tensor, got None"),
        ({"gate": torch.ones(2, 4)}, "gate: expected what broadcasts to (batch, heads, length_q) = (2, 4, 33)"),
        ({"gate": torch.ones(2, 3, 33)}, "gate: expected what broadcasts to (batch, heads, length_q) = (2, 4, 33)"),
        ({"addend": torch.ones(2, 4, 33).double()}, "addend: expected torch.float32 on cpu, got torch.float64"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str, backend: object) -> None:
    inputs, _ = random_inputs(SHAPE, torch.float32, torch.device("cpu"))
    inputs |= _rows(torch.float32, torch.device("cpu"))
    with pytest.raises(RuntimeError, match=re.escape(message)):
        attnx.affine_attention(**inputs | change)
