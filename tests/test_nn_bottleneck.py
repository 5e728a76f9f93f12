"""DiscreteKeyValueBottleneck: which values a token gets, what learns, and how keys move."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from attnx.nn import DiscreteKeyValueBottleneck, bottleneck

pytestmark = [pytest.mark.backends("cpu"), pytest.mark.usefixtures("backend")]


def module(**options: Any) -> DiscreteKeyValueBottleneck:
    torch.manual_seed(0)
    return DiscreteKeyValueBottleneck(24, 4, 50, value_dim=7, **options)


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, 24, generator=torch.Generator().manual_seed(1))


def by_distance(model: DiscreteKeyValueBottleneck, x: Tensor) -> tuple[Tensor, Tensor]:
    """The indices and the output in float64, of all distances."""
    flat = x.double().reshape(-1, 24)
    if model.projection is None:
        rows = flat.unflatten(1, (model.num_codebooks, -1)).transpose(0, 1)
    else:
        rows = flat @ model.projection.double()
    index = torch.cdist(rows, model.keys.double()).argmin(-1)
    values = model.values.double().gather(1, index[..., None].expand(-1, -1, model.value_dim))
    return index.mT.reshape(*x.shape[:-1], -1), values.mean(0).reshape(*x.shape[:-1], -1)


@pytest.mark.parametrize("at_once", [4096, 120, 3])
@pytest.mark.parametrize("key_dim", [None, 5])
def test_definition(key_dim: int | None, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bottleneck, "_PAIRS_AT_ONCE", at_once)
    model, x = module(key_dim=key_dim), tokens(3, 11)
    index, output = by_distance(model, x)
    assert torch.equal(model.nearest(x), index)
    torch.testing.assert_close(model(x), output.float())
    assert model(x[:0]).shape == (0, 11, 7)


def test_ties_go_to_the_first_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bottleneck, "_PAIRS_AT_ONCE", 40)
    model = module()
    model.keys.copy_(model.keys[:, :1].round().expand_as(model.keys).clone())  # sums of integers are exact
    assert not model.nearest(tokens(9).round()).any()


def test_values_alone_learn() -> None:
    model, x = module().double(), tokens(5, 6).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: torch.func.functional_call(model, {"values": v}, (x,)), (model.values,))
    output = model(x)
    grad = torch.randn_like(output)
    (of_values,) = torch.autograd.grad(output, (model.values,), grad)
    index, expected = model.nearest(x).flatten(0, 1), torch.zeros_like(model.values)
    for token, row in enumerate(index):
        for c in range(4):
            expected[c, row[c]] += grad.flatten(0, 1)[token] / 4
    torch.testing.assert_close(of_values, expected)
    assert model(x.detach()).requires_grad
    assert {name for name, _ in model.named_parameters()} == {"values"}


def test_keys_find_the_tokens() -> None:
    """They end on the means of the tokens that are next to them, and calls leave them alone then."""
    generator = torch.Generator().manual_seed(5)
    centres = 5 * torch.randn(6, 24, generator=generator)
    model = DiscreteKeyValueBottleneck(24, 2, 6, decay=0.5)

    def batch() -> Tensor:
        return (centres + 0.1 * torch.randn(200, 6, 24, generator=generator)).flatten(0, 1)

    model.init_keys_(centres, generator=generator)
    shares = centres.unflatten(1, (2, 12)).transpose(0, 1)
    assert torch.cdist(shares, model.keys).amin(-1).max() == 0  # each is one of the tokens, none twice
    model.keys.add_(0.5)
    for _ in range(20):
        model.update_keys_(batch())
    assert torch.cdist(shares, model.keys).amin(-1).max() < 0.1
    before = model.keys.clone()
    model.train()(batch()).sum().backward()
    assert torch.equal(model.keys, before)


def test_a_step_of_the_average() -> None:
    model, x = module(decay=0.9, key_dim=3), tokens(40)
    index, _ = by_distance(model, x)
    rows = x.double() @ model.projection.double()
    counts, keys = model.counts.double(), model.keys.double()
    expected_counts, expected = 0.9 * counts, 0.9 * counts[..., None] * keys
    for c in range(4):
        for token in range(40):
            expected_counts[c, index[token, c]] += 0.1
            expected[c, index[token, c]] += 0.1 * rows[c, token]
    model.update_keys_(x)
    torch.testing.assert_close(model.counts, expected_counts.float())
    torch.testing.assert_close(model.keys, (expected / expected_counts[..., None]).float())
    for _ in range(3000):
        model.update_keys_(x[:1])  # the counts of all others fall to 0
    assert model.keys.isfinite().all()
    model.init_keys_(x[:1])
    assert (model.keys == model.keys[:, :1]).all()
    assert (model.counts == 1).all()


def test_dtypes() -> None:
    model, x = module(key_dim=5), tokens(9)
    index = model.nearest(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.nearest(x), index)
    half = model.bfloat16()
    assert (half.keys.dtype, half.counts.dtype, half.projection.dtype) == (torch.float32,) * 3
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(half.nearest(x), index)


@pytest.mark.parametrize("backend_of_compile", ["aot_eager", "inductor"])
def test_compiled(backend_of_compile: str) -> None:
    model = module()
    compiled = torch.compile(model, fullgraph=True, backend=backend_of_compile, dynamic=True)
    for length in (7, 12):
        x = tokens(2, length)
        model.zero_grad()
        expected = model(x)
        expected.sum().backward()
        want = model.values.grad.clone()
        model.zero_grad()
        output = compiled(x)
        output.sum().backward()
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(model.values.grad, want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_codebooks": 5}, "num_codebooks: expected a divisor of embed_dim = 24 where key_dim is not given, got 5"),
        ({"num_keys": 0}, "num_keys: expected a positive int, got 0"),
        ({"decay": 1.5}, "decay: expected from 0 to 1, got 1.5"),
    ],
    ids=str,
)
def test_bad_module(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        DiscreteKeyValueBottleneck(**({"embed_dim": 24, "num_codebooks": 4, "num_keys": 50} | options))


def test_bad_input() -> None:
    model = module()
    with pytest.raises(
        ValueError, match=r"^x: expected floating point of shape \(\.\.\., 24\), got torch.float32 of shape \(2, 23\)"
    ):
        model(tokens(2)[:, 1:])
    with pytest.raises(ValueError, match=r"^x: expected floating point of shape \(\.\.\., 24\), got torch.int64"):
        model(tokens(2).long())
    with pytest.raises(ValueError, match=r"^x: expected one token at least, got a tensor of shape \(0, 24\)"):
        model.init_keys_(tokens(2)[:0])
