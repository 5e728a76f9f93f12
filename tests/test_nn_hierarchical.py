"""HierarchicalSparseAttention and BoundaryPredictor: what they compute, and what they refuse."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnx
from attnx.nn import BoundaryPredictor, HierarchicalSparseAttention

pytestmark = [pytest.mark.backends("cpu"), pytest.mark.usefixtures("backend")]

OPTIONS: dict[str, Any] = {"budget": 40, "block_size": 16, "recent": 8, "chunk_length": 10}


def predictor(**options: Any) -> BoundaryPredictor:
    torch.manual_seed(0)
    return BoundaryPredictor(12, hidden=7, **options).double()


def keys(length: int = 33) -> Tensor:
    return torch.randn(2, 2, length, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def tokens(length: int = 100) -> Tensor:
    return torch.randn(2, length, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("window", [1, 4])
def test_logits(window: int) -> None:
    """Windows are cut out for every place, and each is coded by itself."""
    module, key = predictor(window=window), keys()
    features = F.pad(key.transpose(1, 2).flatten(2), (0, 0, window, window))

    def code(rows: Tensor) -> Tensor:
        mixed = (rows * module.over_window.weight[:, 0].mT).sum(1) + module.over_window.bias
        return module.code(mixed.relu()).relu()

    for place in range(33):
        left, right = code(features[:, place : place + window]), code(features[:, place + window : place + 2 * window])
        both = [left, right, (left - right).abs(), left * right, F.cosine_similarity(left, right, eps=1e-6)[:, None]]
        expected = module.logit(module.compare(torch.cat(both, -1)).relu())[:, 0]
        torch.testing.assert_close(module(key)[:, place], expected)


def test_chunk_starts() -> None:
    module, key = predictor(), keys()
    logits = module(key)[:, 1:]
    starts = module.chunk_starts(key, 6)
    assert (starts.dtype, starts.shape) == (torch.int32, (2, 7))
    for row, own in zip(starts.tolist(), logits, strict=True):
        assert row == [0, *sorted((own.topk(5).indices + 1).tolist()), 33]
    assert module.chunk_starts(key, 1).tolist() == [[0, 33]] * 2
    assert module.chunk_starts(keys(3), 5).tolist() == [[0, 1, 2, 3, 3, 3]] * 2


def test_predictor_learns_boundaries() -> None:
    """Keys of a chunk are alike. A few steps find most places where they change; one place in twelve is one."""
    torch.manual_seed(0)
    module = BoundaryPredictor(12, hidden=16)
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    target = (torch.arange(60) % 10 == 0).float().expand(32, -1)
    for _ in range(80):
        key = torch.randn(32, 1, 6, 12).repeat_interleave(10, 2) + 0.1 * torch.randn(32, 1, 60, 12)
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(module(key), target).backward()
        optimizer.step()
    held_out = torch.randn(4, 1, 6, 12).repeat_interleave(10, 2) + 0.1 * torch.randn(4, 1, 60, 12)
    found = module.chunk_starts(held_out, 6)[:, 1:-1]
    assert (found % 10 == 0).double().mean() > 0.7


@pytest.mark.parametrize("own", [False, True], ids=["equal_chunks", "predicted"])
def test_attends_by_the_function(own: bool) -> None:
    torch.manual_seed(0)
    boundaries = predictor() if own else None
    module = HierarchicalSparseAttention(24, 4, num_kv_heads=2, **OPTIONS, boundaries=boundaries).double()
    x = tokens()
    query, key, value = module.project(x, None)
    starts = torch.arange(0, 101, 10, dtype=torch.int32)[None]
    if boundaries is not None:
        starts = boundaries.chunk_starts(key, 10)
    options = {name: OPTIONS[name] for name in ("budget", "block_size", "recent")}
    expected = module.merge(attnx.hierarchical_attention(query, key, value, starts, **options))
    assert torch.equal(module(x), expected)
    module(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for name, p in module.named_parameters() if "boundaries" not in name)
    assert all(p.grad is None for name, p in module.named_parameters() if "boundaries" in name)


def test_budget_for_all_is_the_softmax_it_is_made_from() -> None:
    torch.manual_seed(0)
    trained = nn.MultiheadAttention(24, 4, batch_first=True, dtype=torch.float64).eval()
    x = tokens(50)
    module = HierarchicalSparseAttention.from_softmax(trained, budget=50, block_size=16, recent=8)
    hidden = torch.ones(50, 50, dtype=torch.bool).triu(1)
    torch.testing.assert_close(module(x), trained(x, x, x, attn_mask=hidden)[0])
    # A prompt in two parts, the second of which has the first as context.
    torch.testing.assert_close(module(x[:, 30:], x), module(x)[:, 30:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 20}, "budget: expected at least block_size + recent - 1 = 23, got 20"),
        ({"chunk_length": 0}, "chunk_length: expected a positive int, got 0"),
        (
            {"boundaries": nn.Identity()},
            "boundaries: expected None or a BoundaryPredictor of 24 features, got Identity()",
        ),
        ({"boundaries": predictor()}, "boundaries: expected None or a BoundaryPredictor of 24 features, got Boundary"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        HierarchicalSparseAttention(24, 4, **OPTIONS | change)


def test_bad_calls() -> None:
    with pytest.raises(ValueError, match=r"^key: expected \(batch, kv_heads, length, head_dim\) of 12 features"):
        predictor()(torch.ones(2, 3, 5, 6))
    with pytest.raises(ValueError, match=r"^attn_mask: expected None"):
        HierarchicalSparseAttention(24, 4, **OPTIONS).double()(tokens(), attn_mask=torch.ones(100, 100))
    with pytest.raises(ValueError, match=r"^chunks: expected a positive int, got 0"):
        predictor().chunk_starts(keys(), 0)
    for name in ("window", "hidden"):
        with pytest.raises(ValueError, match=f"^{name}: expected a positive int, got 0"):
            BoundaryPredictor(12, **{name: 0})
