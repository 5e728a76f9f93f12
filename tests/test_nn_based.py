"""BasedAttention against its definition, whole, in pieces and token by token."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnx import reference
from attnx.nn import BasedAttention
from stateful_cases import by_pieces, check_results, check_steps

pytestmark = [pytest.mark.backends("cpu"), pytest.mark.usefixtures("backend")]


def rotate(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary embedding of pairs of features."""

    def rotated(x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[2], dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.1, 0.01])
        turned = torch.view_as_complex(x.double().unflatten(3, (-1, 2)).contiguous()) * torch.polar(
            torch.ones_like(angles), angles
        )
        return torch.view_as_real(turned).flatten(3).to(x.dtype)

    return rotated(query), rotated(key)


KINDS: dict[str, dict[str, Any]] = {
    "linear": {"feature_dim": 5},
    "linear, grouped": {"num_kv_heads": 2, "head_dim": 7, "linear_bias": True},
    "window": {"window": 9, "num_kv_heads": 2},
    "window of one": {"window": 1},
    "window, rotary": {"window": 9, "rotary": rotate, "linear_bias": True},
}
EVERY = pytest.mark.parametrize("kind", KINDS)


def module(kind: str, **options: Any) -> BasedAttention:
    torch.manual_seed(0)
    return BasedAttention(24, 4, **KINDS[kind] | {"dtype": torch.float64} | options)


def tokens(length: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return 2 * torch.randn(2, length, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def by_hand(attention: BasedAttention, x: Tensor) -> Tensor:
    """Every pair of tokens has a weight."""

    def heads(projection: torch.nn.Linear, features: int) -> Tensor:
        rows = projection(x).unflatten(2, (-1, features)).transpose(1, 2)
        return rows.repeat_interleave(4 // rows.shape[1], 1)

    query, key = (heads(p, attention.feature_dim) for p in (attention.q_proj, attention.k_proj))
    distance = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
    if attention.window is None:
        t = query @ key.mT * attention.feature_dim**-0.5
        weights = (1 + t + t.square() / 2) * (distance >= 0)
    else:
        if attention.rotary is not None:
            query, key = attention.rotary(query, key)
        logits = query @ key.mT * attention.head_dim**-0.5
        weights = logits.exp() * ((distance >= 0) & (distance < attention.window))
    weights = weights / weights.sum(-1, keepdim=True)
    return attention.out_proj((weights @ heads(attention.v_proj, attention.head_dim)).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("length", [1, 20, 150, 700])
@EVERY
def test_definition(kind: str, length: int) -> None:
    """Below some 500 tokens the linear layers weigh all pairs, above they go by states."""
    attention, x = module(kind), tokens(length).requires_grad_()
    inputs = [x, *attention.parameters()]
    check_results(attention(x), by_hand(attention, x), inputs)


@EVERY
@given(data=st.data())
def test_any_pieces(kind: str, data: st.DataObject) -> None:
    """Outputs and gradients are those of the whole sequence."""
    sizes = data.draw(st.lists(st.one_of(st.integers(1, 9), st.integers(1, 90)), min_size=1, max_size=5))
    attention, x = module(kind), tokens(sum(sizes)).requires_grad_()
    check_results(by_pieces(attention, x, sizes), attention(x), [x, *attention.parameters()])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@EVERY
def test_steps(kind: str, dtype: torch.dtype) -> None:
    close = {} if dtype != torch.bfloat16 else {"rtol": 0.05, "atol": 0.02}
    check_steps(module(kind, dtype=dtype), tokens(100, dtype), 70, **close)


def test_linear_pieces_at_borders_of_chunks_agree_to_the_bit() -> None:
    attention, x = module("linear, grouped", dtype=torch.float32), tokens(256, torch.float32)
    whole, last = attention.prefill(x)
    first, state = attention.prefill(x[:, :128])
    second, state = attention.prefill(x[:, 128:], state)
    assert torch.equal(torch.cat((first, second), 1), whole)
    assert torch.equal(state[0], last[0])


def test_size_of_states() -> None:
    """It is the same after any number of tokens, but for windows that are not full."""
    for length in (40, 300):
        assert module("linear").prefill(tokens(length))[1][0].shape == (2, 4, 21, 7)
        assert [y.shape for y in module("window").prefill(tokens(length))[1]] == [(2, 2, 8, 6)] * 2
    assert module("window").prefill(tokens(3))[1][0].shape[2] == 3
    assert module("window of one").prefill(tokens(3))[1][0].shape[2] == 0


@EVERY
def test_gradcheck(kind: str) -> None:
    attention, x = module(kind), tokens(12).requires_grad_()

    def in_two(x: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        first, state = attention.prefill(x[:, :5])
        second, state = attention.prefill(x[:, 5:], state)
        return (first, second, *state)

    assert torch.autograd.gradcheck(in_two, (x, *attention.parameters()), fast_mode=True)


@pytest.mark.parametrize("form", ["checkpoint", "compiled"])
@EVERY
def test_in_pytorch(kind: str, form: str) -> None:
    torch._dynamo.reset()
    attention, x = module(kind), tokens(30)
    other: Callable[..., Tensor] = torch.compile(attention, fullgraph=True, backend="aot_eager")
    if form == "checkpoint":
        other = lambda x: checkpoint(attention, x, use_reentrant=False)  # noqa: E731
    results = []
    for function in (attention, other):
        output = function(x)
        results.append((output, *torch.autograd.grad(output.square().sum(), list(attention.parameters()))))
    torch.testing.assert_close(*results)


@EVERY
def test_copies(kind: str) -> None:
    attention, other = module(kind), module(kind, device="meta").to_empty(device="cpu")
    other.load_state_dict(attention.state_dict())
    assert torch.equal(other(tokens(9)), attention(tokens(9)))
    assert repr(copy.deepcopy(attention)) == repr(attention)


def test_weights_of_the_reference() -> None:
    """The linear layer is the reference between its projections."""
    attention, x = module("linear"), tokens(130)
    rows = [p(x).unflatten(2, (4, -1)).transpose(1, 2) for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
    expected = attention.out_proj(reference.linear_attention(*rows).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x), expected)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "heads": ({"num_kv_heads": 3}, "num_kv_heads: expected a divisor of num_heads = 4, got 3"),
    "window": ({"window": 0}, "window: expected a positive int, got 0"),
    "feature_dim": ({"feature_dim": 65}, "feature_dim: expected 64 at most, got 65"),
    "rotary": ({"rotary": rotate}, "rotary: expected None without a window"),
    "no rotary": ({"rotary": 1, "window": 2}, "rotary: expected a callable"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        BasedAttention(24, 4, **options)


def test_bad_input() -> None:
    attention = module("linear")
    with pytest.raises(ValueError, match=r"^num_heads: expected a divisor of embed_dim = 24"):
        BasedAttention(24, 5)
    with pytest.raises(ValueError, match=r"^x: expected \(batch, length, 24\), got a tensor of shape \(2, 3, 23\)"):
        attention(tokens(3)[..., 1:])
    with pytest.raises(ValueError, match=r"^x: expected \(batch, 24\), got a tensor of shape \(2, 3, 24\)"):
        attention.step(tokens(3))
    with pytest.raises(ValueError, match=r"^state: expected a tuple of 1 tensors, got a tensor"):
        attention.step(tokens(3)[:, 0], torch.zeros(2, 4, 21, 7))
    with pytest.raises(ValueError, match=r"^state\[0\]: expected shape \(2, 4, 21, 7\), got a tensor of shape"):
        attention.step(tokens(3)[:, 0], (torch.zeros(2, 4, 21, 6),))
    with pytest.raises(RuntimeError, match=r"^initial_state: expected float64 .*, got float32"):
        attention.step(tokens(3)[:, 0], (torch.zeros(2, 4, 21, 7),))
    with pytest.raises(ValueError, match=r"^state\[1\]: expected shape \(2, 2, any, 6\)"):
        module("window").step(tokens(3)[:, 0], (torch.zeros(2, 2, 5, 6), torch.zeros(2, 4, 5, 6)))
