"""AffineScaledAttention: what it computes, and how its average of gates moves."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnx import reference
from attnx.nn import AffineScaledAttention

pytestmark = pytest.mark.backends("cpu")


def module(**options: object) -> AffineScaledAttention:
    torch.manual_seed(0)
    return AffineScaledAttention(24, 4, num_kv_heads=2, **options).double()


def tokens(length: int = 9, seed: int = 1) -> Tensor:
    return 3 * torch.randn(2, length, 24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": (2, 0)}], ids=str)
def test_weights_sum_to_the_average(options: dict[str, object], backend: object) -> None:
    """The output is that of the weights alpha P + (average - alpha) / n, made by hand."""
    attention, x = module(**options), tokens()
    with torch.no_grad():
        attention.gate_average.copy_(torch.tensor([0.1, 0.4, 0.6, 0.9]))
    query, key, value = attention.project(x, None)
    gate = (0.1 * (x @ attention.gate_proj.weight.mT) + 0.5).clamp(0, 1).transpose(1, 2)
    visible = reference.visible_keys(9, 9, x.device, **options).double()
    count = visible.sum(-1)
    ones = torch.eye(9, dtype=torch.float64).expand(2, 2, 9, 9)
    weights = reference.softmax_attention(query, key, ones, **options)
    average = attention.gate_average.double()[:, None]
    weights = gate[..., None] * weights + ((average - gate) / count)[..., None] * visible
    assert torch.allclose(weights.sum(-1), average.expand(2, 4, 9))
    expected = attention.merge(weights @ value.repeat_interleave(2, dim=1))
    torch.testing.assert_close(attention(x), expected)


def moved(attention: AffineScaledAttention, x: Tensor) -> Tensor:
    gate = (0.1 * attention.gate_proj(x) + 0.5).clamp(0, 1)
    return attention.gate_average.lerp(gate.mean((0, 1)).float(), 0.1).detach()


def test_a_backward_moves_the_average(backend: object) -> None:
    attention, x = module(), tokens()
    expected, before = moved(attention, x), attention.gate_average.clone()
    of_evaluation = attention.eval()(x)
    output = attention.train()(x)
    assert torch.equal(output, of_evaluation)
    assert torch.equal(attention.gate_average, before)
    output.sum().backward()
    torch.testing.assert_close(attention.gate_average, expected)
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in attention.parameters())


@pytest.mark.parametrize("form", ["reentrant", "not_reentrant", "compiled"])
def test_a_repeated_forward_sees_the_same_average(form: str, backend: object) -> None:
    plain, attention = module(), module()

    def run(x: Tensor) -> Tensor:
        return checkpoint(attention, x, use_reentrant=form == "reentrant")

    other = torch.compile(attention, fullgraph=True, backend="aot_eager") if form == "compiled" else run
    for seed in range(3):
        for function in (plain, other):
            x = tokens(seed=seed).requires_grad_()
            function(x).square().sum().backward()
    torch.testing.assert_close(attention.gate_average, plain.gate_average)
    for x, y in zip(attention.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(x.grad, y.grad)


def test_bad_decay(backend: object) -> None:
    with pytest.raises(ValueError, match=r"^decay: expected from 0 to 1, got 1.5"):
        module(decay=1.5)


def test_copies_are_alike(backend: object) -> None:
    attention = module(is_causal=True)
    assert repr(copy.deepcopy(attention)) == repr(attention)
