"""HybridChunkAttention against its definition, whole, in pieces and token by token."""

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
from attnx.nn import HybridChunkAttention
from stateful_cases import by_pieces, check_results, check_steps, trained

pytestmark = [pytest.mark.backends("cpu"), pytest.mark.usefixtures("backend")]

KINDS: dict[str, dict[str, Any]] = {"heads": {}, "groups": {"num_groups": 2, "head_dim": 5}}
EVERY = pytest.mark.parametrize("kind", KINDS)


def module(kind: str = "heads", **options: Any) -> HybridChunkAttention:
    torch.manual_seed(0)
    made = HybridChunkAttention(24, 4, **KINDS[kind] | {"dtype": torch.float64} | options)
    if made.A_log.device.type != "meta":
        with torch.no_grad():
            made.A_log.uniform_(-5, -3)
            for norm in (made.q_norm, made.k_norm, made.linear_norm, made.softmax_norm):
                norm.weight.uniform_(0.5, 1.5)
    return made


def tokens(length: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, length, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def by_hand(layer: HybridChunkAttention, x: Tensor) -> Tensor:
    """Pairs of tokens and their weights, and the rule token by token."""
    length, group = x.shape[1], layer.num_heads // layer.num_groups
    chunks = length // 64

    def heads(projection: torch.nn.Linear) -> Tensor:
        return projection(x).unflatten(2, (layer.num_heads, -1)).transpose(1, 2)

    def norm(y: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
        return weight * y / (y.square().mean(-1, keepdim=True) + eps).sqrt()

    def unit(y: Tensor) -> Tensor:
        return y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt()

    query, key, value = heads(layer.q_proj), heads(layer.k_proj), heads(layer.v_proj)
    means = torch.stack([x[:, 64 * c : 64 * c + 64].mean(1) for c in range(chunks)], 1) if chunks else x[:, :0]
    logits = layer.router(means).unflatten(2, (layer.num_groups, 2)).transpose(1, 2).repeat_interleave(group, 1)
    learned = logits.softmax(-1)
    types = torch.stack((logits[..., 0] >= logits[..., 1], logits[..., 0] < logits[..., 1]), -1).double()
    types = F.pad(types + (learned - learned.detach()), (0, 0, 0, 1))

    place = torch.arange(length)
    chunk = place // 64
    # A softmax chunk counts as often as its type says, for its own tokens, too.
    taken = types[:, :, chunk, 0][:, :, None]
    own, before = chunk[:, None] == chunk, chunk[:, None] > chunk
    factor = torch.where(taken.detach() > 0.5, taken, 1.0)
    seen = (own & (place[:, None] >= place)) | (before & (taken.detach() > 0.5))
    products = norm(query, layer.q_norm.weight) @ norm(key, layer.k_norm.weight).mT
    weights = (products * layer.head_dim**-0.5).exp() * factor * seen
    softmax = weights @ value / weights.sum(-1, keepdim=True)

    decay = -layer.A_log.exp()[:, None] * (1 + (layer.decay_proj(x).mT + layer.dt_bias[:, None]).exp()).log()
    linear = reference.gated_delta_rule(
        unit(query),
        unit(key),
        value,
        decay,
        layer.beta_proj(x).mT.sigmoid(),
        carry=types[:, :, : -(-length // 64), 1],
    )
    mix = (query @ layer.mix_proj.weight.mT).softmax(-1)
    out = mix[..., :1] * norm(linear, layer.linear_norm.weight) + mix[..., 1:] * norm(
        softmax, layer.softmax_norm.weight
    )
    gate = layer.gate_proj(x)
    return layer.out_proj(out.transpose(1, 2).flatten(2) * gate * gate.sigmoid())


@pytest.mark.parametrize("length", [1, 63, 64, 130, 400])
@EVERY
def test_definition(kind: str, length: int) -> None:
    layer, x = module(kind), tokens(length).requires_grad_()
    inputs = [x, *(p for name, p in layer.named_parameters() if length >= 64 or name != "router.weight")]
    check_results(layer(x), by_hand(layer, x), inputs)


def test_chunks_are_of_both_types() -> None:
    """Otherwise the tests here would show little."""
    for kind in KINDS:
        routes = module(kind).routes(tokens(400))
        assert routes.shape == (2, module(kind).num_groups, 6)
        assert 0.2 < routes.double().mean() < 0.8
    assert module().routes(tokens(63)).shape == (2, 4, 0)


def test_a_tie_is_a_softmax_chunk() -> None:
    layer = module()
    torch.nn.init.zeros_(layer.router.weight)
    assert layer.routes(tokens(64)).all()
    torch.testing.assert_close(layer(tokens(130)), by_hand(layer, tokens(130)))


@EVERY
@given(data=st.data())
def test_any_pieces(kind: str, data: st.DataObject) -> None:
    """Outputs are those of the whole sequence, and so are gradients, but for that of the router."""
    sizes = data.draw(st.lists(st.one_of(st.integers(0, 9), st.integers(1, 200)), max_size=5))
    sizes = [*sizes, 1]
    layer, x = module(kind), tokens(sum(sizes)).requires_grad_()
    output = by_pieces(layer, x, sizes)
    torch.testing.assert_close(output, layer(x))
    layer.router.requires_grad_(False)
    check_results(output, layer(x), trained(layer))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@EVERY
def test_steps(kind: str, dtype: torch.dtype) -> None:
    """The tokens cross two borders of chunks."""
    close = {} if dtype != torch.bfloat16 else {"rtol": 0.1, "atol": 0.05}
    check_steps(module(kind).to(dtype), tokens(330, dtype), 200, **close)


def test_state() -> None:
    """It keeps the keys of softmax chunks, and of the tokens since the last border."""
    layer, x = module(), tokens(400)
    _, state = layer.prefill(x)
    kept = 64 * layer.routes(x).sum(2)
    assert torch.equal(state[8], kept.int())
    assert state[6].shape[2] == kept.max()
    assert state[4].shape[2] == 400 % 64
    pieces = None
    for piece in x.split(90, 1):
        _, pieces = layer.prefill(piece, pieces)
    visible = torch.arange(state[6].shape[2]) < state[8][..., None]
    for i, (one, other) in enumerate(zip(state, pieces, strict=True)):
        one, other = (y * visible[..., None] if i in (6, 7) else y for y in (one, other))
        torch.testing.assert_close(one, other)


def test_the_router_learns() -> None:
    """Its gradient is what the types of chunks would have if they were numbers, of each chunk."""
    layer, x = module(), tokens(260)
    layer(x).square().sum().backward()
    grads = layer.router.weight.grad.unflatten(0, (4, 2))
    assert bool((grads.abs().sum((1, 2)) > 0).all())


def test_gradcheck() -> None:
    """In two pieces, with a border in the first and one at the end of the second."""
    layer, x = module(), tokens(128).requires_grad_()
    inputs = [x, *(p for name, p in layer.named_parameters() if name != "router.weight")]

    def in_two(x: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        first, state = layer.prefill(x[:, :70])
        second, state = layer.prefill(x[:, 70:], state)
        return (first, second, state[0], state[1], state[6])

    assert torch.autograd.gradcheck(in_two, inputs, fast_mode=True)


@pytest.mark.parametrize("form", ["checkpoint", "compiled"])
def test_in_pytorch(form: str) -> None:
    torch._dynamo.reset()
    layer, x = module(), tokens(150)
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
    assert torch.equal(other(tokens(70)), layer(tokens(70)))
    assert repr(copy.deepcopy(layer)) == repr(layer)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"^num_groups: expected a divisor of num_heads = 4, got 3"):
        HybridChunkAttention(24, 4, num_groups=3)
    with pytest.raises(ValueError, match=r"^num_heads: expected a divisor of embed_dim = 24"):
        HybridChunkAttention(24, 5)
    layer = module()
    with pytest.raises(ValueError, match=r"^x: expected \(batch, length, 24\), got a tensor of shape \(2, 3, 23\)"):
        layer(tokens(3)[..., 1:])
    _, state = layer.prefill(tokens(3))
    with pytest.raises(ValueError, match=r"^state: expected a tuple of 9 tensors, got"):
        layer.step(tokens(3)[:, 0], state[1:])
    with pytest.raises(ValueError, match=r"^state\[4\]: expected shape \(2, 4, any, 6\), got a tensor of shape"):
        layer.step(tokens(3)[:, 0], (*state[:4], state[4][:1], *state[5:]))
