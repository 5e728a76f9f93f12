"""Gradients against finite differences in float64, and every way autograd may ask for them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import attnx
from cases import MASKS, OPERATORS, Shape, pack, random_inputs, random_parameter
from compare import check, forward_backward

# Finite differences say something in float64 alone.
in_float64 = pytest.mark.parametrize("dtype", [torch.float64], ids=str)
SMALL = Shape(batch=2, heads=4, kv_heads=2, length_q=5, length_k=6, head_dim=3, value_dim=2)


def all_leaves(operator: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """All differentiable inputs of an operator."""
    inputs, _ = random_inputs(shape, dtype, device)
    return {name: x.requires_grad_() for name, x in (inputs | parameters(operator, shape.heads, dtype, device)).items()}


def parameters(operator: str, heads: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    slopes = {"alibi_slopes": random_parameter((heads,), dtype, device)}
    bias = {"bias": random_parameter((heads,), dtype, device) - 1}
    return slopes | bias if operator.startswith("sigmoid") else slopes


def gradcheck(attention: Callable[..., Tensor], leaves: dict[str, Tensor], **options: Any) -> None:
    def positional(*tensors: Tensor) -> Tensor:
        return attention(**dict(zip(leaves, tensors, strict=True)), **options)

    assert torch.autograd.gradcheck(positional, tuple(leaves.values()), nondet_tol=0.0)


@in_float64
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_gradcheck(operator: str, mask: str, dtype: torch.dtype, device: torch.device) -> None:
    gradcheck(getattr(attnx, operator), all_leaves(operator, SMALL, dtype, device), **MASKS[mask])


@in_float64
@pytest.mark.parametrize("bias", [None, "row", "scalar"])
def test_gradcheck_bias(bias: str | None, dtype: torch.dtype, device: torch.device) -> None:
    leaves = all_leaves("sigmoid_attention", SMALL, dtype, device)
    del leaves["bias"]
    options = {"bias": bias}
    if bias == "scalar":
        leaves["bias"] = torch.tensor(-1.5, dtype=dtype, device=device, requires_grad=True)
        options = {}
    gradcheck(attnx.sigmoid_attention, leaves, is_causal=True, **options)


@in_float64
@pytest.mark.parametrize("operator", OPERATORS)
def test_gradcheck_varlen(operator: str, dtype: torch.dtype, device: torch.device) -> None:
    inputs, _, sizes = pack(([2, 0, 3], [3, 1, 2]), dtype, device)
    inputs = {name: x[..., :3] for name, x in inputs.items()}
    leaves = {n: x.detach().requires_grad_() for n, x in (inputs | parameters(operator, 4, dtype, device)).items()}
    gradcheck(getattr(attnx, f"{operator}_varlen"), leaves, is_causal=True, **sizes)


@pytest.mark.parametrize("operator", OPERATORS)
def test_gradient_for_any_subset_of_inputs(
    operator: str, dtype: torch.dtype, device: torch.device, deterministic: None
) -> None:
    """Whatever is asked for, the numbers are those of asking for all."""
    leaves = {name: x.detach() for name, x in all_leaves(operator, SMALL, dtype, device).items()}
    grad_output = torch.ones(SMALL.output(), dtype=dtype, device=device)
    everything = forward_backward(getattr(attnx, operator), leaves, grad_output)
    for size in (1, 2):
        for names in itertools.combinations(leaves, size):
            asked = {name: leaves[name] for name in names}
            fixed = {name: x for name, x in leaves.items() if name not in names}
            results = forward_backward(getattr(attnx, operator), asked, grad_output, **fixed)
            for name, result in results.items():
                assert torch.equal(result, everything[name]), f"{name} when asked for {names}"


@pytest.mark.parametrize("operator", OPERATORS)
def test_no_graph_without_need(operator: str, dtype: torch.dtype, device: torch.device) -> None:
    inputs, _ = random_inputs(SMALL, dtype, device)
    assert not getattr(attnx, operator)(**inputs).requires_grad
    inputs["query"].requires_grad_()
    with torch.no_grad():
        assert not getattr(attnx, operator)(**inputs).requires_grad


@pytest.mark.parametrize("operator", OPERATORS)
def test_gradients_accumulate(operator: str, dtype: torch.dtype, device: torch.device) -> None:
    """One tensor as query, key and value at once receives the sum of the three gradients."""
    inputs, grad_output = random_inputs(Shape(), dtype, device)
    x = inputs["query"]
    separate = forward_backward(
        getattr(attnx, operator), {"query": x, "key": x.clone(), "value": x.clone()}, grad_output
    )
    shared = x.clone().requires_grad_()
    getattr(attnx, operator)(shared, shared, shared).backward(grad_output)
    parts = torch.stack([separate[f"grad_{name}"] for name in inputs]).double()
    rounding = 2 * torch.finfo(dtype).eps * parts.abs().sum(0).max().item()
    torch.testing.assert_close(shared.grad.double(), parts.sum(0), rtol=0, atol=rounding)


GRAD_OUTPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "scalar_expanded": lambda g: g[:1, :1, :1, :1].expand(g.shape),
    "heads_last": lambda g: g.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "every_other_feature": lambda g: torch.stack([g, g], -1).flatten(-2)[..., ::2],
}


@pytest.mark.parametrize("layout", GRAD_OUTPUTS.values(), ids=GRAD_OUTPUTS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_any_layout_of_grad_output(
    operator: str, layout: Callable[[Tensor], Tensor], dtype: torch.dtype, device: torch.device
) -> None:
    """Autograd, not the caller, chooses the strides of the incoming gradient: sum().backward() sends stride 0."""
    inputs, grad_output = random_inputs(Shape(heads=4, kv_heads=2), dtype, device)
    check(operator, inputs, layout(grad_output))


@pytest.mark.parametrize("operator", OPERATORS)
def test_double_backward_is_refused(operator: str, dtype: torch.dtype, device: torch.device) -> None:
    inputs, _ = random_inputs(SMALL, dtype, device)
    query = inputs.pop("query").requires_grad_()
    output = getattr(attnx, operator)(query, **inputs)
    (gradient,) = torch.autograd.grad(output.sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match=f"{operator}: no second derivative"):
        gradient.sum().backward()
