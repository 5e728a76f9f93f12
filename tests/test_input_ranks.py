"""Inputs as scaled_dot_product_attention takes them: of any rank, with sizes that broadcast, by its keywords."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import attnx
from attnx import _layouts
from cases import Shape, random_inputs
from compare import forward_backward
from routing_cases import random_centroids

D, VALUE_DIM = 16, 24


def draw(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


# Leading sizes of query, key and value.
LEADING = {
    "no batch": ([4], [4], [4]),
    "no batch, grouped": ([4], [2], [2]),
    "two batches": ([2, 3, 4], [2, 3, 4], [2, 3, 4]),
    "three batches, grouped": ([2, 1, 2, 4], [2, 1, 2, 2], [2, 1, 2, 2]),
    "one batch of keys": ([3, 4], [1, 4], [1, 4]),
    "one batch of queries": ([1, 4], [3, 4], [3, 4]),
    "one batch of values": ([2, 3, 4], [2, 3, 4], [1, 3, 4]),
    "one head of keys": ([2, 4], [2, 1], [2, 4]),
    "one head of values": ([2, 4], [2, 4], [2, 1]),
    "one head of queries": ([2, 1], [2, 4], [2, 4]),
    "batches apart": ([2, 1, 4], [1, 3, 4], [1, 1, 4]),
}


def inputs_of(name: str, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    q, k, v = LEADING[name]
    sizes = {"query": [*q, 20, D], "key": [*k, 30, D], "value": [*v, 30, VALUE_DIM]}
    return {x: draw(*size, dtype=dtype, device=device) for x, size in sizes.items()}


def expanded(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with all sizes written out, (batch, heads, length, dim) each."""
    leading = [max(sizes) for sizes in zip(*(x.shape[:-2] for x in inputs.values()), strict=True)]
    grouped = inputs["key"].shape[-3] not in (1, leading[-1])
    result = {}
    for name, x in inputs.items():
        heads = [x.shape[-3]] if grouped and name != "query" else leading[-1:]
        result[name] = x.expand(*leading[:-1], *heads, *x.shape[-2:]).reshape(-1, heads[0], *x.shape[-2:])
    return result


def options_of(operator: str, inputs: dict[str, Tensor], device: torch.device) -> dict[str, Any]:
    heads = expanded(inputs)["query"].shape[1]
    if operator == "block_sparse_attention":
        return {"block_mask": attnx.BlockMask.from_dense(torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device))}
    if operator == "routing_attention":
        return {"routes": random_centroids(heads, 3, D).to(device), "routing": "argmax"}
    return {"seed": 3, "offset": 1} if operator == "probabilistic_attention" else {"is_causal": True}


@pytest.mark.parametrize("name", LEADING)
@pytest.mark.parametrize(
    "operator",
    [
        "softmax_attention",
        "sigmoid_attention",
        "block_sparse_attention",
        "probabilistic_attention",
        "sparse_linear_attention",
        "routing_attention",
    ],
)
def test_same_as_written_out(operator: str, name: str, dtype: torch.dtype, device: torch.device) -> None:
    """The bits of the call of four dimensions, and gradients that are summed where a size served several."""
    inputs = inputs_of(name, dtype, device)
    options = options_of(operator, inputs, device)
    function: Any = getattr(attnx, operator)

    def first(results: Any) -> Tensor:
        return torch.cat(results, -1) if isinstance(results, tuple) else results

    output = first(function(**inputs, **options))
    leading = torch.broadcast_shapes(*(x.shape[:-3] for x in inputs.values()))
    whole = expanded(inputs)
    expected = first(function(**whole, **options))
    assert output.shape == (*leading, *expected.shape[1:])
    assert torch.equal(output.reshape(expected.shape), expected)
    grad_output = draw(*output.shape, dtype=dtype, device=device)
    actual = forward_backward(lambda **x: first(function(**x, **options)), inputs, grad_output)

    def written_out(**x: Tensor) -> Tensor:
        return first(function(**expanded(x), **options)).reshape(grad_output.shape)

    wanted = forward_backward(written_out, inputs, grad_output)
    for key, x in wanted.items():
        rounding = 4 * torch.finfo(dtype).eps  # sums over sizes that served several are rounded in another order
        bound = rounding * float(x.abs().max())
        torch.testing.assert_close(actual[key], x, rtol=0, atol=bound, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("name", [x for x in LEADING if "grouped" not in x])
def test_scaled_dot_product_attention(name: str, device: torch.device) -> None:
    """Keyword for keyword, in float64."""
    inputs = inputs_of(name, torch.float64, device)
    leading = torch.broadcast_shapes(*(x.shape[:-2] for x in inputs.values()))
    masks = [
        None,
        draw(20, 30, dtype=torch.float64, device=device),
        draw(20, 1, dtype=torch.float64, device=device),
        draw(*leading, 20, 30, dtype=torch.float64, device=device),
        draw(*(1 for _ in leading), 20, 30, dtype=torch.float64, device=device) < 1,
    ]
    for mask in masks:
        options: dict[str, Any] = {"attn_mask": mask, "dropout_p": 0.0, "is_causal": False, "scale": 0.3}
        expected = scaled_dot_product_attention(**inputs, **options)
        actual = attnx.softmax_attention(**inputs, **options, enable_gqa=True)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_logsumexp_has_the_rank_of_the_inputs(dtype: torch.dtype, device: torch.device) -> None:
    for name, shape in (("no batch", (4, 20)), ("two batches", (2, 3, 4, 20))):
        _, logsumexp = attnx.softmax_attention(**inputs_of(name, dtype, device), return_logsumexp=True)
        assert logsumexp.shape == shape


@pytest.mark.parametrize("name", ["no batch", "two batches", "one head of keys"])
def test_compiled(name: str, dtype: torch.dtype, device: torch.device) -> None:
    inputs = inputs_of(name, dtype, device)
    compiled = torch.compile(attnx.softmax_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**inputs), attnx.softmax_attention(**inputs))


def test_explain(dtype: torch.dtype, device: torch.device) -> None:
    inputs = inputs_of("no batch, grouped", dtype, device)
    assert attnx.explain(attnx.softmax_attention, **inputs).supported


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_causal": None}, "is_causal: expected True or False, got None"),
        ({"enable_gqa": 1}, "enable_gqa: expected True or False, got 1"),
        ({"query": torch.zeros(20, D)}, "query: expected 4 dimensions"),
        ({"key": torch.zeros(4, 30, D)}, "key: expected 4 dimensions"),
        ({"key": torch.zeros(3, 4, 30, D)}, r"key: expected shape \(2, 4, 30, 16\), got \(3, 4, 30, 16\)"),
        ({"value": torch.zeros(2, 3, 30, D)}, r"value: expected shape \(2, 4, 30, 16\), got \(2, 3, 30, 16\)"),
        ({"query": None}, "query: expected a tensor, got None"),
    ],
    ids=str,
)
@pytest.mark.backends("cpu")
def test_bad_input(change: dict[str, Any], message: str, device: torch.device) -> None:
    inputs, _ = random_inputs(Shape(20, 30, D, batch=2, heads=4), torch.float32, device)
    with pytest.raises(RuntimeError, match=message):
        attnx.softmax_attention(**inputs | change)


def test_plain_inputs_are_passed_on(dtype: torch.dtype, device: torch.device) -> None:
    inputs, _ = random_inputs(Shape(20, 30, D, batch=2, heads=4, kv_heads=2), dtype, device)
    assert all(x is y for x, y in zip(_layouts.four_dimensions(*inputs.values()), inputs.values(), strict=True))
