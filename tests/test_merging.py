"""What parts of the keys give together, and weight that moves between parts."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
from torch import Tensor

import attnx
from attnx import reference
from attnx.testing import assert_close, eager_softmax_attention
from cases import DTYPES, Shape, random_inputs

CUTS = [[40], [0, 40], [13, 13, 20], [1, 2, 3, 39]]


def parts(inputs: dict[str, Tensor], cuts: list[int], **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Results over the keys between cuts; a part may have no keys."""
    ends = [0, *cuts, inputs["key"].shape[2]]
    results = [
        attnx.softmax_attention(
            inputs["query"], inputs["key"][:, :, a:b], inputs["value"][:, :, a:b], return_logsumexp=True, **options
        )
        for a, b in itertools.pairwise(ends)
    ]
    return [x for x, _ in results], [x for _, x in results]


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merged_parts_are_the_whole(cuts: list[int], dtype: torch.dtype, device: torch.device) -> None:
    inputs, grad_output = random_inputs(Shape(9, 41, 16, 24, heads=4, kv_heads=2), dtype, device)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    output, logsumexp = attnx.merge_attention(*parts(leaves, cuts))
    gradients = torch.autograd.grad(output, list(leaves.values()), grad_output)

    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    expected, sums = reference.softmax_attention(**exact, return_logsumexp=True)
    plain = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    baseline = eager_softmax_attention(**plain)
    assert_close(output, expected, baseline, factor=3)  # each part is rounded before it is added
    assert_close(logsumexp, sums, sums.to(logsumexp.dtype), dtype=dtype)
    expected_gradients = torch.autograd.grad(expected, list(exact.values()), grad_output.double())
    plain_gradients = torch.autograd.grad(baseline, list(plain.values()), grad_output)
    for name, x, want, yardstick in zip(leaves, gradients, expected_gradients, plain_gradients, strict=True):
        assert_close(x, want, yardstick, factor=3, name=f"grad_{name}")


def test_rows_without_keys(dtype: torch.dtype, device: torch.device) -> None:
    inputs, _ = random_inputs(Shape(9, 4, 16), dtype, device)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    whole = attnx.softmax_attention(**leaves, is_causal=True, return_logsumexp=True)
    output, logsumexp = attnx.merge_attention([whole[0], whole[0]], [whole[1], torch.full_like(whole[1], -torch.inf)])
    assert torch.equal(logsumexp == -torch.inf, whole[1] == -torch.inf)
    assert not output[:, :, :5].any()
    seen = logsumexp[:, :, 5:]
    for x in torch.autograd.grad(output.sum() + seen.sum(), list(leaves.values())):
        assert x.isfinite().all()


def test_factors(device: torch.device, dtype: torch.dtype) -> None:
    inputs, _ = random_inputs(Shape(5, 12, 16), dtype, device)
    outputs, sums = parts(inputs, [7])
    factor = torch.rand(1, 2, 5, device=device)
    scaled, logsumexp = attnx.merge_attention(outputs, sums, factors=[factor, 0.0])
    share = factor.double() * (sums[0].double() - logsumexp.double()).exp()
    expected = share[..., None] * outputs[0].double()
    assert_close(scaled, expected, expected.to(dtype))


def dense(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The weights and values in float64."""
    query, key, value = (x.double() for x in inputs.values())
    return (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1), value


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("targeted", [False, True])
def test_redistribution(dtype: torch.dtype, targeted: bool, device: torch.device) -> None:
    """The weights themselves, moved by hand."""
    inputs, _ = random_inputs(Shape(9, 12, 16), dtype, device)
    outputs, sums = parts(inputs, [3, 8])  # the source, the target, and others
    output, logsumexp = attnx.softmax_attention(**inputs, return_logsumexp=True)
    target = (outputs[1], sums[1]) if targeted else ()
    changed = attnx.redistribute_attention(output, logsumexp, outputs[0], sums[0], *target, keep=0.4)

    weights, value = dense(inputs)
    given = 0.6 * weights[..., :3].sum(-1, keepdim=True)
    takes = torch.zeros(12, dtype=torch.bool)
    takes[3 : 8 if targeted else 12] = True
    taking = weights.where(takes.to(device), 0.0)
    moved = weights + given * taking / taking.sum(-1, keepdim=True)
    moved[..., :3] *= 0.4
    assert torch.allclose(moved.sum(-1), torch.ones((), dtype=torch.float64))
    plain = moved.to(dtype) @ value.to(dtype)
    assert_close(changed, moved @ value, plain, factor=4, floor=8)


def test_rows_that_stay(dtype: torch.dtype, device: torch.device) -> None:
    inputs, _ = random_inputs(Shape(9, 12, 16), dtype, device)
    outputs, sums = parts(inputs, [12])
    where = torch.arange(9, device=device) % 2 == 0
    output, logsumexp = outputs[0], sums[0]
    all_of_it = attnx.redistribute_attention(output, logsumexp, output, logsumexp, keep=0.4)
    assert torch.equal(all_of_it, output)
    to_none = attnx.redistribute_attention(output, logsumexp, output, logsumexp, outputs[1], sums[1], keep=0.4)
    assert torch.equal(to_none, output)
    from_none = attnx.redistribute_attention(output, logsumexp, outputs[1], sums[1], keep=0.4)
    assert torch.equal(from_none, output)
    halves, half_sums = parts(inputs, [6])
    some = attnx.redistribute_attention(output, logsumexp, halves[0], half_sums[0], keep=0.4, where=where)
    every = attnx.redistribute_attention(output, logsumexp, halves[0], half_sums[0], keep=0.4)
    assert torch.equal(some, every.where(where[:, None], output))


@pytest.mark.backends("cpu")
def test_gradients(backend: object) -> None:
    inputs, _ = random_inputs(Shape(4, 9, 8), torch.float64, torch.device("cpu"))

    def redistributed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        given = {"query": query, "key": key, "value": value}
        outputs, sums = parts(given, [2, 5])
        whole = attnx.merge_attention(outputs, sums)
        to_rest = attnx.redistribute_attention(*whole, outputs[0], sums[0], keep=0.4)
        return attnx.redistribute_attention(to_rest, whole[1], outputs[0], sums[0], outputs[1], sums[1], keep=0.6)

    assert torch.autograd.gradcheck(redistributed, [x.requires_grad_() for x in inputs.values()])


@pytest.mark.backends("cpu")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logsumexps": []}, "logsumexps: expected one for each of at least one output, got 0 for 2"),
        ({"factors": [1.0]}, "factors: expected one for each of 2 outputs, got 1"),
        ({"outputs": [torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 5)]}, "outputs: expected torch.float32 of shape"),
        ({"logsumexps": [torch.zeros(1, 2, 3), torch.zeros(1, 2, 4)]}, "logsumexps: expected torch.float32 of shape"),
        ({"logsumexps": [torch.zeros(1, 2, 3)] * 2, "outputs": [None, None]}, "outputs: expected a tensor, got None"),
    ],
)
def test_bad_input_of_merge(change: dict[str, Any], message: str, backend: object) -> None:
    given = {"outputs": [torch.zeros(1, 2, 3, 4)] * 2, "logsumexps": [torch.zeros(1, 2, 3)] * 2}
    with pytest.raises(RuntimeError, match=re.escape(message)):
        attnx.merge_attention(**given | change)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": 1.5}, "keep: expected a number from 0 to 1, got 1.5"),
        ({"where": torch.ones(3)}, "where: expected a bool tensor, got torch.float32"),
        ({"target_output": torch.zeros(1, 2, 3, 4)}, "target_logsumexp: expected one with target_output"),
        ({"source_output": torch.zeros(1, 2, 3, 5)}, "source_output: expected torch.float32 of shape (1, 2, 3, 4)"),
        ({"logsumexp": torch.zeros(1, 2, 3).double()}, "logsumexp: expected torch.float32 of shape (1, 2, 3)"),
    ],
)
def test_bad_input_of_redistribute(change: dict[str, Any], message: str, backend: object) -> None:
    rows, sums = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3)
    given = {"output": rows, "logsumexp": sums, "source_output": rows, "source_logsumexp": sums, "keep": 0.4}
    with pytest.raises(RuntimeError, match=re.escape(message)):
        attnx.redistribute_attention(**given | change)
