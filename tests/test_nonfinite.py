"""NaN and Inf in an input reach exactly the outputs and gradients that depend on them."""

from __future__ import annotations

import math

import pytest
import torch

import attnx
from cases import DTYPES, MASKS, OPERATORS, Shape, random_inputs, visible_pairs
from compare import forward_backward
from visible_sums import attention_sums

SHAPES = [Shape(heads=1, length_q=7, length_k=9, head_dim=4), Shape(heads=1, length_q=70, length_k=40, head_dim=20)]
SHAPES += [Shape(heads=1, length_q=2, length_k=9, head_dim=4)]  # few enough for keys on the lanes of any CPU

PLACES = ["query", "key", "value", "grad_output"]
POISONS = [math.nan, math.inf, -math.inf]
KINDS = [("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)]
# Inf - Inf is NaN, so which of the two a gradient becomes depends on the order of its sums.
NOT_FINITE = [("a number that is not finite", lambda x: ~x.isfinite())]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_sums_are_the_definition(operator: str, mask: str) -> None:
    """The oracle of this file agrees with the reference where everything is finite."""
    inputs, grad_output = random_inputs(SHAPES[0], torch.float64, torch.device("cpu"))
    expected = _expected(operator, SHAPES[0], inputs, grad_output, mask)
    options = {"bias": 0.0} if operator == "sigmoid_attention" else {}
    reference = forward_backward(getattr(attnx.reference, operator), inputs, grad_output, **options, **MASKS[mask])
    for name, x in expected.items():
        torch.testing.assert_close(x, reference[name][0, 0])


@pytest.mark.needs("hidden_nonfinite")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("poison", POISONS, ids=str)
@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_reaches_what_depends_on_it(
    operator: str, shape: Shape, where: str, poison: float, mask: str, dtype: torch.dtype, device: torch.device
) -> None:
    _check(operator, shape, dtype, where, poison, mask, device)


@pytest.mark.needs("hidden_nonfinite")
@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_on_each_instruction_set(
    operator: str, dtype: torch.dtype, where: str, instruction_set: str | None, device: torch.device
) -> None:
    _check(operator, SHAPES[1], dtype, where, math.nan, "causal", device)
    _check(operator, SHAPES[1], dtype, where, math.nan, "window_both", device)


@pytest.mark.parametrize("mask", ["full", "causal", "window_both"])
@pytest.mark.parametrize("poison", POISONS, ids=str)
@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_is_never_lost(
    operator: str, dtype: torch.dtype, where: str, poison: float, mask: str, device: torch.device
) -> None:
    """What holds on every backend: a result that depends on it is not finite, wherever else it may have spread."""
    results, expected = _poisoned(operator, SHAPES[1], dtype, where, poison, mask, device)
    for name, want in expected.items():
        lost = (results[name].isfinite() & ~want.isfinite()).nonzero().tolist()
        assert not lost, f"{name}: finite at (row, feature) {lost[:5]} of {len(lost)}"


@pytest.mark.needs("hidden_nonfinite")
@pytest.mark.parametrize("operator", OPERATORS)
def test_hidden_nan_leaves_no_trace(
    operator: str, dtype: torch.dtype, device: torch.device, deterministic: None
) -> None:
    """Keys and values that no query sees may hold anything: the bits of every result stay."""
    _check_no_trace(operator, Shape(length_q=20, length_k=60), dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_nan_in_unvisited_tiles_leaves_no_trace(
    operator: str, dtype: torch.dtype, device: torch.device, deterministic: None
) -> None:
    """The same of keys that are further from any visible one than a tile is wide."""
    _check_no_trace(operator, Shape(length_q=20, length_k=600), dtype, device, distance=256)


def _check_no_trace(operator: str, shape: Shape, dtype: torch.dtype, device: torch.device, distance: int = 0) -> None:
    inputs, grad_output = random_inputs(shape, dtype, device)
    options = {"is_causal": True, "window": (4, -1)}
    clean = forward_backward(getattr(attnx, operator), inputs, grad_output, **options)
    first_visible = shape.length_k - shape.length_q - 4
    for name in ("key", "value"):
        inputs[name] = inputs[name].clone()
        inputs[name][:, :, : first_visible - distance] = math.nan
    poisoned = forward_backward(getattr(attnx, operator), inputs, grad_output, **options)
    for name, x in clean.items():
        assert torch.equal(x, poisoned[name]), name


@pytest.mark.parametrize("operator", OPERATORS)
def test_batches_and_heads_stay_apart(operator: str, dtype: torch.dtype, device: torch.device) -> None:
    """One batch entry and one key head poisoned: its own queries suffer, the others do not."""
    inputs, grad_output = random_inputs(Shape(batch=2, heads=4, kv_heads=2), dtype, device)
    inputs["value"][1, 0, 5, 3] = math.nan
    results = forward_backward(getattr(attnx, operator), inputs, grad_output)
    suffers = torch.zeros(2, 4, dtype=torch.bool, device=device)
    suffers[1, :2] = True
    for name in ("output", "grad_query"):
        assert torch.equal(results[name].isnan().any(-1).any(-1), suffers), name


def _check(
    operator: str, shape: Shape, dtype: torch.dtype, where: str, poison: float, mask: str, device: torch.device
) -> None:
    results, expected = _poisoned(operator, shape, dtype, where, poison, mask, device)
    for name, want in expected.items():
        for kind, test in KINDS if math.isnan(poison) or name == "output" else NOT_FINITE:
            differ = (test(results[name]) != test(want)).nonzero().tolist()
            assert not differ, f"{name}: {kind} misplaced at (row, feature) {differ[:5]} of {len(differ)}"


def _poisoned(
    operator: str, shape: Shape, dtype: torch.dtype, where: str, poison: float, mask: str, device: torch.device
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The results, of one head, with one number replaced; and what they are by definition."""
    inputs, grad_output = random_inputs(shape, dtype, device)
    target = grad_output if where == "grad_output" else inputs[where]
    target[0, 0, target.shape[2] // 2, 1] = poison
    options = {"bias": 0.0} if operator == "sigmoid_attention" else {}
    results = forward_backward(getattr(attnx, operator), inputs, grad_output, **options, **MASKS[mask])
    return {name: x[0, 0].double() for name, x in results.items()}, _expected(
        operator, shape, inputs, grad_output, mask
    )


def _expected(
    operator: str, shape: Shape, inputs: dict[str, torch.Tensor], grad_output: torch.Tensor, mask: str
) -> dict[str, torch.Tensor]:
    visible = visible_pairs(shape, **MASKS[mask]).to(grad_output.device)
    heads = {name: x[0, 0] for name, x in inputs.items()}
    return attention_sums("softmax" in operator, **heads, grad_output=grad_output[0, 0], visible=visible)
