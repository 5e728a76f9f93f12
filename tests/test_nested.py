"""Nested tensors of layout torch.jagged: sequences of their own lengths, without padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import attnx
from routing_cases import random_centroids

LENGTHS_Q, LENGTHS_K = [3, 70, 1], [5, 64, 9]
FUNCTIONS: dict[str, dict[str, Any]] = {
    "sigmoid_attention": {"bias": -2.0, "alibi_slopes": torch.tensor([0.1, 0.2])},
    "softmax_attention": {"is_causal": True, "window": (40, -1), "sink": torch.tensor(0.5)},
    "sparse_linear_attention": {"critical": 0.5, "is_causal": True},
}


def nested(lengths: list[int], dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Tensor, list[Tensor]]:
    """(batch, heads, lengths, head_dim), and its sequences, each (1, heads, length, head_dim)."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(n, 2, 16, generator=generator).to(device, dtype).requires_grad_() for n in lengths]
    made = torch.nested.as_nested_tensor([x.detach() for x in rows], layout=torch.jagged).requires_grad_()
    return made, rows


@pytest.mark.parametrize("name", FUNCTIONS)
def test_is_a_call_for_each_sequence(name: str, dtype: torch.dtype, device: torch.device) -> None:
    function: Callable[..., Any] = getattr(attnx, name)
    options = {k: x.to(device) if isinstance(x, Tensor) else x for k, x in FUNCTIONS[name].items()}
    query, queries = nested(LENGTHS_Q, dtype, device, 0)
    key, keys = nested(LENGTHS_K, dtype, device, 1)
    value = key * 2
    output = function(*(x.transpose(1, 2) for x in (query, key, value)), **options)
    first = output[0] if isinstance(output, tuple) else output
    assert first.is_nested
    assert first.shape == query.transpose(1, 2).shape  # the same ragged lengths, so that a sum of both works
    grads = torch.autograd.grad(first.transpose(1, 2).values().sum(), [query, key])

    for i, (q, k) in enumerate(zip(queries, keys, strict=True)):
        own = function(*(x.transpose(0, 1)[None] for x in (q, k, k * 2)), **options)
        own = own[0] if isinstance(own, tuple) else own
        torch.testing.assert_close(first.transpose(1, 2).unbind()[i], own[0].transpose(0, 1))
        expected = torch.autograd.grad(own.sum(), [q, k])
        for gradient, x in zip(grads, expected, strict=True):
            torch.testing.assert_close(gradient.unbind()[i], x)


def test_logsumexp_is_nested(dtype: torch.dtype, device: torch.device) -> None:
    query, queries = nested(LENGTHS_Q, dtype, device, 0)
    x = query.transpose(1, 2)
    _, logsumexp = attnx.softmax_attention(x, x, x, return_logsumexp=True)
    for row, q in zip(logsumexp.transpose(1, 2).unbind(), queries, strict=True):
        own = q.transpose(0, 1)[None]
        torch.testing.assert_close(row, attnx.softmax_attention(own, own, own, return_logsumexp=True)[1][0].mT)


@pytest.mark.backends("cpu")
def test_others_say_which_take_them(dtype: torch.dtype, device: torch.device) -> None:
    x = nested(LENGTHS_Q, dtype, device, 0)[0].transpose(1, 2)
    mask = attnx.BlockMask.from_dense(torch.ones(1, 1, 2, 2, dtype=torch.bool))
    cache = attnx.StaircaseCache(3, 2, 32, 100)
    calls: list[Callable[[], object]] = [
        lambda: attnx.block_sparse_attention(x, x, x, mask),
        lambda: attnx.probabilistic_attention(x, x, x),
        lambda: attnx.routing_attention(x, x, x, random_centroids(2, 3, 16)),
        lambda: cache.attend(x),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=r"^query: expected a tensor, got a nested one; sigmoid_attention, "):
            call()
    with pytest.raises(RuntimeError, match=r"^key: expected a nested tensor of layout torch.jagged beside others, got"):
        attnx.softmax_attention(x, torch.ones(3, 2, 70, 16), x)
    with pytest.raises(
        RuntimeError, match=r"^query: expected \(batch, heads, lengths, head_dim\) as a transposed view"
    ):
        attnx.softmax_attention(x.transpose(1, 2), x, x)
    with pytest.raises(RuntimeError, match=r"^value: expected sequences as long as those of key, got others"):
        attnx.softmax_attention(x, x, nested(LENGTHS_K, dtype, device, 0)[0].transpose(1, 2))
