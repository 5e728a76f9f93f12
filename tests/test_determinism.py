"""The same numbers every time, bit for bit, whatever else is in the batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attnx
from cases import DTYPES, MASKS, OPERATORS, Shape, random_inputs, random_parameter
from compare import check, forward_backward

SHAPE = Shape(batch=3, heads=4, kv_heads=2, length_q=130, length_k=200, head_dim=40)


def inputs_with_parameters(operator: str, dtype: torch.dtype, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    inputs, grad_output = random_inputs(SHAPE, dtype, device)
    inputs["alibi_slopes"] = random_parameter((SHAPE.heads,), dtype, device)
    if operator == "sigmoid_attention":
        inputs["bias"] = random_parameter((SHAPE.heads,), dtype, device) - 4
    return inputs, grad_output


def assert_bitwise_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("mask", ["full", "window_causal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_repeats_bitwise(
    operator: str, dtype: torch.dtype, mask: str, threads: int | None, device: torch.device, deterministic: None
) -> None:
    inputs, grad_output = inputs_with_parameters(operator, dtype, device)
    attention = getattr(attnx, operator)
    first = forward_backward(attention, inputs, grad_output, **MASKS[mask])
    for _ in range(5):
        assert_bitwise_equal(forward_backward(attention, inputs, grad_output, **MASKS[mask]), first)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.backends("cpu")
def test_number_of_threads_changes_no_output(
    operator: str, threads: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Nor the gradient of query; those of key and value are sums that as many threads share as there are."""
    inputs, grad_output = inputs_with_parameters(operator, dtype, device)
    results = check(operator, inputs, grad_output)
    torch.set_num_threads(1)
    single = forward_backward(getattr(attnx, operator), inputs, grad_output)
    for name in ("output", "grad_query"):
        assert torch.equal(results[name], single[name]), name


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.backends("cpu")
def test_parts_of_a_long_key_are_merged(operator: str, threads: int, dtype: torch.dtype, device: torch.device) -> None:
    """Of one head, more parts than some rows see keys in; repeatable at any number of threads.

    The logsumexp of so many keys is near 9 and rounded to 4 units, by which the backward's weights of a row are off.
    """
    inputs, grad_output = random_inputs(Shape(length_q=3, length_k=5000, heads=2, kv_heads=1), dtype, device)
    for options in ({}, {"is_causal": True, "window": (4000, -1)}, {"window": (70, 0)}):
        results = check(operator, inputs, grad_output, gradient_floor=16, **options)
        again = forward_backward(getattr(attnx, operator), inputs, grad_output, **options)
        assert torch.equal(results["output"], again["output"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_neighbours_in_the_batch_change_nothing(
    operator: str, dtype: torch.dtype, device: torch.device, deterministic: None
) -> None:
    inputs, grad_output = random_inputs(SHAPE, dtype, device)
    attention = getattr(attnx, operator)
    batched = forward_backward(attention, inputs, grad_output)
    for i in range(SHAPE.batch):
        alone = forward_backward(attention, {n: x[i : i + 1] for n, x in inputs.items()}, grad_output[i : i + 1])
        assert_bitwise_equal({n: x[i : i + 1] for n, x in batched.items()}, alone)


def test_bitwise_comparison_can_fail(dtype: torch.dtype, device: torch.device) -> None:
    """The order of a sum shows: keys in reverse give the same attention, but not the same bits."""
    inputs, grad_output = random_inputs(SHAPE, dtype, device)
    reverse = inputs | {name: inputs[name].flip(2) for name in ("key", "value")}
    first = forward_backward(attnx.sigmoid_attention, inputs, grad_output)
    second = forward_backward(attnx.sigmoid_attention, reverse, grad_output)
    assert not torch.equal(first["output"], second["output"])
    torch.testing.assert_close(first["output"], second["output"], rtol=0, atol=max(1e-5, torch.finfo(dtype).eps))
