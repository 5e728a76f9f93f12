"""Tokens that stay, packed end to end."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import attnx

X = torch.arange(24, dtype=torch.float32).view(2, 4, 3)


def test_mask(device: torch.device) -> None:
    keep = torch.tensor([[True, False, True, False], [False, False, False, False]], device=device)
    x = X.to(device)
    tokens, cu_seqlens, indices = attnx.compact_tokens(x, keep)
    assert torch.equal(tokens, x[0, [0, 2]])
    assert cu_seqlens.tolist() == [0, 2, 2]
    assert cu_seqlens.dtype == torch.int32
    assert indices.tolist() == [0, 2]
    assert indices.dtype == torch.int32


def test_highest_scores(device: torch.device) -> None:
    """They stay in their order; of equal ones the earlier stays, and NaN goes first."""
    scores = torch.tensor([[0.5, 0.5, 0.9, 0.5], [torch.nan, 3.0, -torch.inf, 2.0]], device=device)
    x = X.to(device)
    packed = attnx.compact_tokens(x, scores=scores, k=2)
    assert packed.indices.tolist() == [0, 2, 1, 3]
    assert packed.cu_seqlens.tolist() == [0, 2, 4]
    assert torch.equal(packed.tokens, torch.cat([x[0, [0, 2]], x[1, [1, 3]]]))
    assert attnx.compact_tokens(x, scores=scores, k=0).tokens.shape == (0, 3)
    assert torch.equal(attnx.compact_tokens(x, scores=scores, k=4).tokens, x.flatten(0, 1))


def test_threshold(device: torch.device) -> None:
    scores = torch.tensor([[0.5, 0.1, 0.9, torch.nan], [0.0, 0.1, 0.1, 0.5]], device=device)
    packed = attnx.compact_tokens(X.to(device), scores=scores, threshold=0.5)
    assert packed.indices.tolist() == [0, 2, 3]
    assert packed.cu_seqlens.tolist() == [0, 2, 3]


def test_what_stays_gets_the_gradient(device: torch.device) -> None:
    x = X.to(device).requires_grad_()
    packed = attnx.compact_tokens(x, scores=x[..., 0], k=1)
    (gradient,) = torch.autograd.grad(packed.tokens.square().sum(), x)
    expected = torch.zeros_like(x)
    expected[:, 3] = 2 * x[:, 3].detach()
    assert torch.equal(gradient, expected)


def test_into_varlen_attention(device: torch.device, dtype: torch.dtype) -> None:
    """What is left attends as each sequence of it would alone."""
    torch.manual_seed(0)
    x = torch.randn(3, 20, 2, 16).to(device, dtype)
    keep = torch.rand(3, 20, device=device) < 0.5
    keep[1] = False
    tokens, ends, _ = attnx.compact_tokens(x, keep)
    output = attnx.softmax_attention_varlen(tokens, tokens, tokens, ends, ends, 20, 20, is_causal=True)
    for i in range(3):
        own = x[i, keep[i]].transpose(0, 1)[None]
        alone = attnx.softmax_attention(own, own, own, is_causal=True)[0].transpose(0, 1)
        assert torch.allclose(output[ends[i] : ends[i + 1]], alone, rtol=1e-2, atol=1e-2)


def test_compiled_with_k() -> None:
    compiled = torch.compile(attnx.compact_tokens, fullgraph=True, backend="aot_eager")
    for got, want in zip(
        compiled(X, scores=X[..., 0], k=3), attnx.compact_tokens(X, scores=X[..., 0], k=3), strict=True
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "keep: expected either a mask or scores, got neither"),
        (
            {"keep": torch.ones(2, 4).bool(), "scores": torch.ones(2, 4)},
            "keep: expected either a mask or scores, got both",
        ),
        ({"keep": torch.ones(2, 4)}, "keep: expected a bool tensor, got torch.float32"),
        ({"keep": torch.ones(2, 3).bool()}, "keep: expected shape (2, 4) on cpu, got (2, 3) on cpu"),
        ({"keep": torch.ones(2, 4).bool(), "k": 1}, "k: expected None with keep"),
        ({"scores": torch.ones(2, 4)}, "k: expected either k or threshold with scores, got neither"),
        (
            {"scores": torch.ones(2, 4), "k": 1, "threshold": 0.5},
            "k: expected either k or threshold with scores, got both",
        ),
        ({"scores": torch.ones(2, 4), "k": 5}, "k: expected an int from 0 to the length, 4, got 5"),
        ({"scores": torch.ones(2, 4), "threshold": "low"}, "threshold: expected a number, got 'low'"),
    ],
)
def test_bad_input(given: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=re.escape(message)):
        attnx.compact_tokens(X, **given)
