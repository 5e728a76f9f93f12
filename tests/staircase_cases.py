"""Caches, what goes into them, and what must come out, for the tests of the staircase."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import attnx
from attnx import reference
from attnx.testing import assert_close, eager_sigmoid_attention, eager_softmax_attention

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LEVELS = [
    (16, 8, 4, 2),
    (16, 8, 4, 2, 1),
    (16, 8, 1),
    (16, 4, 2),
    (16, 2),
    (16, 1),
    (16, 8),
    (16, 4, 4, 4, 1),
]
SMALL: dict[str, Any] = {"window": 64, "group": 32}


def tokens(
    length: int,
    batch: int = 2,
    heads: int = 2,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Keys with a few strong channels, as models have them, and values."""
    generator = torch.Generator().manual_seed(seed)
    key, value = torch.randn(2, batch, heads, length, head_dim, generator=generator, dtype=torch.float64).unbind(0)
    return (key * (1 + 7 * (torch.arange(head_dim) % 13 == 0))).to(device, dtype), value.to(device, dtype)


def cache_of(key: Tensor, value: Tensor, max_length: int | None = None, **options: Any) -> attnx.StaircaseCache:
    batch, heads, length, head_dim = key.shape
    cache = attnx.StaircaseCache(
        batch, heads, head_dim, max_length or length + 64, dtype=key.dtype, device=key.device, **options
    )
    cache.append(key, value)
    return cache


def same(a: attnx.StaircaseCache, b: attnx.StaircaseCache) -> bool:
    """What they read and how many bits it has: the memory no state reads is left out."""
    if not torch.equal(a.lengths, b.lengths):
        return False
    sequences = range(a.batch_size)
    return all(torch.equal(a.bits(i), b.bits(i)) for i in sequences) and all(
        torch.equal(x, y) for x, y in zip(a.dequantize(), b.dequantize(), strict=True)
    )


def eager_logsumexp(query: Tensor, key: Tensor) -> Tensor:
    """Plain PyTorch computes it for causal softmax from logits that are rounded to the dtype of the query."""
    logits = (
        query @ (key.to(query.dtype) * key.shape[3] ** -0.5).repeat_interleave(query.shape[1] // key.shape[1], 1).mT
    )
    hidden = torch.ones_like(logits, dtype=torch.bool).triu(key.shape[2] - query.shape[2] + 1)
    return logits.float().masked_fill(hidden, -torch.inf).logsumexp(-1)


def check_attention(
    score: Any,
    dtype: torch.dtype,
    length_q: int,
    heads: int,
    levels: tuple[int, ...],
    length: int,
    device: torch.device | str = "cpu",
    head_dim: int = 64,
    rounded: bool = True,
    **layout: Any,
) -> None:
    """The CPU reads numbers rounded to the dtype, as dequantize() gives them, and CUDA as they are before that."""
    key, value = tokens(length, dtype=dtype, device=device, head_dim=head_dim)
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(2, heads, length_q, head_dim, generator=generator).to(device, dtype)
    cache = cache_of(key, value, levels=levels, **SMALL | layout)
    read = dict(zip(("key", "value"), cache.dequantize(), strict=True))
    inputs = {"query": query, **read}
    exact = {name: x.double() for name, x in inputs.items()}
    if not rounded:
        numbers = reference.staircase_dequantize(key, value, levels=levels, **SMALL | layout)
        exact |= dict(zip(("key", "value"), numbers, strict=True))
    eager = {"softmax": eager_softmax_attention, "sigmoid": eager_sigmoid_attention}[score]
    if score == "softmax":
        expected = reference.softmax_attention(**exact, is_causal=True, return_logsumexp=True)
        output, logsumexp = cache.attend(query, return_logsumexp=True)
        assert logsumexp.shape == query.shape[:3]
        baseline = eager_logsumexp(query, inputs["key"])
        assert_close(logsumexp, expected[1], baseline, dtype=dtype, name="logsumexp")
        expected = expected[0]
    else:
        expected = reference.sigmoid_attention(**exact, is_causal=True)
        output = cache.attend(query, score="sigmoid")
    assert isinstance(output, Tensor)
    assert (output.dtype, output.shape) == (dtype, query.shape)
    assert_close(output, expected, eager(**inputs, is_causal=True))
