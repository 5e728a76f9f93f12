"""HeadRoutedAttention: one head a token, usage of heads, and heads that are cut."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import attnx
from attnx import reference
from attnx.nn import HeadRoutedAttention
from attnx.testing import assert_close, eager_softmax_attention

pytestmark = [pytest.mark.backends("cpu"), pytest.mark.usefixtures("backend")]


def module(**options: Any) -> HeadRoutedAttention:
    torch.manual_seed(0)
    made = HeadRoutedAttention(24, 4, **options).double()
    with torch.no_grad():
        made.router.weight.mul_(3)
    return made


def tokens(length: int = 37, seed: int = 1) -> Tensor:
    return torch.randn(2, length, 24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(attention: HeadRoutedAttention, x: Tensor, context: Tensor | None = None) -> Tensor:
    """All heads attend, and all but one of a token are left out."""
    query, key, value = attention.project(x, context)
    output = reference.softmax_attention(query, key, value, is_causal=attention.is_causal, scale=attention.scale)
    weights = (x @ attention.router.weight.mT).masked_fill(attention.head_mask == 0, -torch.inf).softmax(-1)
    own = torch.nn.functional.one_hot(weights.argmax(-1), attention.num_heads)
    return attention.merge(output * (weights * own).mT[..., None])


@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"num_kv_heads": 2, "scale": 0.7}, {"qk_norm": True, "output_norm": True}],
    ids=str,
)
def test_one_head_a_token(options: dict[str, Any]) -> None:
    attention, x = module(**options), tokens()
    grad_output = tokens(seed=3)
    results = []
    for function in (attention, lambda x: by_hand(attention, x)):
        leaf = x.clone().requires_grad_()
        output = function(leaf)
        results.append([output, *torch.autograd.grad(output, [leaf, *attention.parameters()], grad_output)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


@pytest.mark.backends("cpu", "cuda", "emulated")
def test_gathered_rows_of_every_backend(dtype: torch.dtype, device: torch.device) -> None:
    attention = module(is_causal=True).to(device, dtype)
    x = tokens(200).to(device, dtype)
    query, key, value = attention.project(x, None)
    weights, heads = attention.route(x)
    everyone = reference.softmax_attention(query, key, value, is_causal=True)
    own = (heads[:, None] == torch.arange(4, device=device)[:, None])[..., None]
    expected = attention.double().merge(everyone * own * weights.double()[:, None, :, None])
    plain = eager_softmax_attention(query, key, value, is_causal=True)
    plain = plain * own * weights.to(dtype)[:, None, :, None]
    assert_close(attention.to(dtype)(x), expected, attention.merge(plain))


def test_context_and_lengths() -> None:
    attention = module()
    torch.testing.assert_close(attention(tokens(), tokens(50, 2)), by_hand(attention, tokens(), tokens(50, 2)))
    assert attention(tokens(0), tokens(5)).shape == (2, 0, 24)
    torch.testing.assert_close(attention(tokens(1)), by_hand(attention, tokens(1)))


def test_usage_follows_backwards() -> None:
    attention, x = module(decay=0.9), tokens()
    _, heads = attention.route(x)
    share = torch.bincount(heads.flatten(), minlength=4) / heads.numel()
    before = attention.usage.clone()
    output = attention.train()(x)
    assert torch.equal(attention.usage, before)
    output.sum().backward()
    torch.testing.assert_close(attention.usage, before.lerp(share.float(), 0.1))
    after = attention.usage.clone()
    attention.eval()(x).sum().backward()
    assert torch.equal(attention.usage, after)
    torch.testing.assert_close(attention.usage.sum(), torch.tensor(1.0))


def test_checkpoints_move_usage_once() -> None:
    plain = module(decay=0.5).train()
    repeated = copy.deepcopy(plain)
    x = tokens().requires_grad_()
    plain(x).sum().backward()
    checkpoint(repeated, x, use_reentrant=False).sum().backward()
    assert torch.equal(plain.usage, repeated.usage)


def test_pruning_keeps_the_most_used() -> None:
    attention, x = module().eval(), tokens()
    attention.usage.copy_(torch.tensor([0.3, 0.1, 0.3, 0.3]))
    attention.prune_(2)
    assert attention.head_mask.tolist() == [1.0, 0.0, 1.0, 0.0]
    assert set(attention.route(x)[1].flatten().tolist()) == {0, 2}
    torch.testing.assert_close(attention(x), by_hand(attention, x))
    attention.usage.copy_(torch.tensor([0.1, 0.6, 0.2, 0.1]))
    attention.prune_(1)
    assert attention.head_mask.tolist() == [0.0, 0.0, 1.0, 0.0]
    for keep in (0, 2, True):
        with pytest.raises(ValueError, match=f"^keep: expected from 1 to the 1 heads that are left, got {keep}"):
            attention.prune_(keep)


def test_one_head_left_is_softmax_with_the_head_mask() -> None:
    attention, x = module(is_causal=True).eval(), tokens()
    attention.prune_(1)
    query, key, value = attention.project(x, None)
    mask = attention.head_mask.double()
    expected = attnx.softmax_attention(query, key, value, is_causal=True, head_mask=mask)
    torch.testing.assert_close(attention(x), attention.merge(expected))


@pytest.mark.parametrize(
    "options", [{}, {"linear_bias": True, "qk_norm": True, "is_causal": True, "scale": 0.5}], ids=str
)
def test_compact_is_the_same_with_fewer_parameters(options: dict[str, Any]) -> None:
    attention, x = module(**options).eval(), tokens()
    attention.usage.copy_(torch.tensor([0.1, 0.4, 0.1, 0.4]))
    attention.prune_(2)
    small = attention.compact()
    assert (small.num_heads, small.head_dim, small.training) == (2, 6, False)
    assert small.q_proj.weight.shape == (12, 24)
    torch.testing.assert_close(small(x), attention(x))
    assert small.usage.tolist() == attention.usage[[1, 3]].tolist()
    assert small.head_mask.tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match=r"^num_kv_heads: expected num_heads = 4"):
        module(num_kv_heads=2).compact()


def test_training_moves_the_router() -> None:
    attention = module().train()
    attention(tokens()).square().sum().backward()
    assert attention.router.weight.grad is not None
    assert attention.router.weight.grad.any()


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"^decay: expected from 0 to 1, got 2"):
        HeadRoutedAttention(24, 4, decay=2)
    with pytest.raises(ValueError, match=r"^key_padding_mask: expected None"):
        module()(tokens(), key_padding_mask=torch.zeros(2, 37, dtype=torch.bool))
    half = module().bfloat16()
    assert half.usage.dtype == half.head_mask.dtype == torch.float32
