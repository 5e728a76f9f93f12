"""GatedDeltaNet against its definition, whole, in pieces and token by token."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from attnx import reference
from attnx.nn import GatedDeltaNet
from stateful_cases import by_pieces, check_results, check_steps

pytestmark = [pytest.mark.backends("cpu"), pytest.mark.usefixtures("backend")]

KINDS: dict[str, dict[str, Any]] = {
    "grouped": {"head_dim": 5, "value_dim": 6},
    "one conv token": {"head_dim": 4, "num_value_heads": 2, "conv_size": 1},
    "long conv": {"head_dim": 4, "num_value_heads": 6, "conv_size": 7},
}
EVERY = pytest.mark.parametrize("kind", KINDS)


def module(kind: str = "grouped", **options: Any) -> GatedDeltaNet:
    torch.manual_seed(0)
    made = GatedDeltaNet(24, 2, **KINDS[kind] | {"dtype": torch.float64} | options)
    if made.A_log.device.type != "meta":
        with torch.no_grad():
            made.A_log.uniform_(-3, 0)
            made.norm.weight.uniform_(0.5, 1.5)
    return made


def tokens(length: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, length, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def by_hand(layer: GatedDeltaNet, x: Tensor) -> Tensor:
    """Head by head of keys, and tap by tap of the convolution."""
    heads, group, d = layer.num_heads, layer.num_value_heads // layer.num_heads, layer.head_dim
    values = group * layer.value_dim
    parts = layer.in_proj_qkvz(x).unflatten(2, (heads, 2 * d + 2 * values))
    query, key, value, gate = parts.split([d, d, values, values], 3)
    features = torch.cat([y.flatten(2) for y in (query, key, value)], 2)
    padded = F.pad(features, (0, 0, layer.conv_size - 1, 0))
    taps = layer.conv1d.weight[:, 0]
    mixed = sum(taps[:, i] * padded[:, i : i + x.shape[1]] for i in range(layer.conv_size))
    mixed = mixed * mixed.sigmoid()
    query, key, value = mixed.split([heads * d, heads * d, heads * values], 2)

    def rows(y: Tensor, count: int) -> Tensor:
        return y.unflatten(2, (count, -1)).transpose(1, 2)

    query, key = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (rows(query, heads), rows(key, heads)))
    b, a = layer.in_proj_ba(x).unflatten(2, (heads, 2 * group)).split(group, 3)
    log_decay = -layer.A_log.exp() * (1 + (a.flatten(2) + layer.dt_bias).exp()).log()
    output = reference.gated_delta_rule(
        query, key, rows(value, heads * group), log_decay.mT, b.flatten(2).sigmoid().mT
    ).transpose(1, 2)
    gate = gate.reshape(output.shape)
    output = layer.norm.weight * output / (output.square().mean(-1, keepdim=True) + layer.norm.eps).sqrt()
    return layer.out_proj((output * gate * gate.sigmoid()).flatten(2))


@pytest.mark.parametrize("length", [1, 5, 20, 130])
@EVERY
def test_definition(kind: str, length: int) -> None:
    layer, x = module(kind), tokens(length).requires_grad_()
    inputs = [x, *layer.parameters()]
    check_results(layer(x), by_hand(layer, x), inputs)


@EVERY
@given(data=st.data())
def test_any_pieces(kind: str, data: st.DataObject) -> None:
    """Outputs and gradients are those of the whole sequence."""
    sizes = data.draw(st.lists(st.one_of(st.integers(0, 9), st.integers(1, 90)), max_size=5))
    sizes = [*sizes, 1]
    layer, x = module(kind), tokens(sum(sizes)).requires_grad_()
    check_results(by_pieces(layer, x, sizes), layer(x), [x, *layer.parameters()])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@EVERY
def test_steps(kind: str, dtype: torch.dtype) -> None:
    close = {} if dtype != torch.bfloat16 else {"rtol": 0.05, "atol": 0.02}
    check_steps(module(kind).to(dtype), tokens(100, dtype), 70, **close)


def test_padding_before_a_sequence() -> None:
    """Rows of 0 leave the outputs of others as they are."""
    layer, x = module(), tokens(20)
    torch.testing.assert_close(layer(F.pad(x, (0, 0, 9, 0)))[:, 9:], layer(x))


def test_gradcheck() -> None:
    layer, x = module(), tokens(12).requires_grad_()

    def in_two(x: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        first, state = layer.prefill(x[:, :5])
        second, state = layer.prefill(x[:, 5:], state)
        return (first, second, *state)

    assert torch.autograd.gradcheck(in_two, (x, *layer.parameters()), fast_mode=True)


@pytest.mark.parametrize("form", ["checkpoint", "compiled"])
def test_in_pytorch(form: str) -> None:
    torch._dynamo.reset()
    layer, x = module(), tokens(30)
    other: Any = torch.compile(layer, fullgraph=True, backend="aot_eager")
    if form == "checkpoint":
        other = lambda x: checkpoint(layer, x, use_reentrant=False)  # noqa: E731
    results = []
    for function in (layer, other):
        output = function(x)
        results.append((output, *torch.autograd.grad(output.square().sum(), list(layer.parameters()))))
    torch.testing.assert_close(*results)


@EVERY
def test_copies(kind: str) -> None:
    layer, other = module(kind), module(kind, device="meta").to_empty(device="cpu")
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(tokens(9)), layer(tokens(9)))
    assert repr(copy.deepcopy(layer)) == repr(layer)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "heads": ({"num_value_heads": 3}, "num_value_heads: expected a multiple of num_heads = 2, got 3"),
    "head_dim": ({"head_dim": 0}, "head_dim: expected a positive int, got 0"),
    "conv_size": ({"conv_size": True}, "conv_size: expected a positive int, got True"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        GatedDeltaNet(24, 2, **options)


def test_bad_input() -> None:
    layer = module()
    with pytest.raises(ValueError, match=r"^layer: expected Qwen3NextGatedDeltaNet of transformers, got Linear"):
        GatedDeltaNet.from_transformers(layer.out_proj)
    with pytest.raises(ValueError, match=r"^x: expected \(batch, length, 24\), got a tensor of shape \(2, 3, 23\)"):
        layer(tokens(3)[..., 1:])
    _, state = layer.prefill(tokens(3))
    with pytest.raises(ValueError, match=r"^state: expected a tuple of 2 tensors, got"):
        layer.step(tokens(3)[:, 0], state[:1])
    with pytest.raises(ValueError, match=r"^state\[1\]: expected shape \(2, 4, 5, 6\), got a tensor of shape"):
        layer.step(tokens(3)[:, 0], (state[0], state[1].mT))
