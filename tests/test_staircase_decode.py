"""Attention of several new tokens over a staircase cache on CUDA: every number of rows, every kernel, every length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import attnx
from attnx import reference
from attnx.testing import assert_close, eager_sigmoid_attention, eager_softmax_attention
from staircase_cases import SMALL, cache_of, check_attention, tokens

pytestmark = [pytest.mark.backends("emulated", "cuda"), pytest.mark.usefixtures("backend")]

REFERENCES: dict[str, Any] = {"softmax": reference.softmax_attention, "sigmoid": reference.sigmoid_attention}
EAGER: dict[str, Any] = {"softmax": eager_softmax_attention, "sigmoid": eager_sigmoid_attention}


@pytest.fixture(autouse=True)
def decoding() -> Iterator[None]:
    """Decoding serves any number of rows, also those for which the mainloop is chosen."""
    with attnx.cuda_mainloop("decode"):
        yield


def queries(batch: int, heads: int, length: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, heads, length, head_dim, generator=generator).to(device, dtype)


def check_sequence(
    score: Any, output: Tensor, query: Tensor, key: Tensor, value: Tensor, logsumexp: Tensor | None, **layout: Any
) -> None:
    """CUDA reads numbers before they are rounded to the dtype."""
    exact = dict(zip(("key", "value"), reference.staircase_dequantize(key, value, **layout), strict=True))
    rounded = {name: x.to(query.dtype) for name, x in exact.items()}
    options: dict[str, Any] = {"is_causal": True}
    if logsumexp is not None:
        options["return_logsumexp"] = True
    expected = REFERENCES[score](query.double(), **exact, **options)
    if logsumexp is not None:
        assert torch.allclose(logsumexp.double(), expected[1], atol=2e-2)
        expected = expected[0]
    assert_close(output, expected, EAGER[score](query, **rounded, is_causal=True))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("group", [1, 3, 4, 8, 16])
def test_new_tokens(score: Any, group: int, dtype: torch.dtype, device: torch.device) -> None:
    """Sequences have lengths of their own, and some fewer new tokens than others."""
    lengths = [310, 129, 33, 17]
    key, value = tokens(max(lengths), batch=len(lengths), dtype=dtype, device=device)
    cache = attnx.StaircaseCache(len(lengths), 2, 64, 330, dtype=dtype, device=device, **SMALL)
    cache.append(key, value, counts=torch.tensor(lengths, device=device))
    for new in (1, 2, 3, 4, 5, 7, 8, 9, 11, 13, 16, 17):
        query = queries(len(lengths), 2 * group, new, 64, dtype, device)
        counts = [new, max(new - 1, 1), new // 2, new]
        options: dict[str, Any] = {"score": score, "query_lengths": torch.tensor(counts, device=device)}
        output, logsumexp = (
            cache.attend(query, return_logsumexp=True, **options)
            if score == "softmax"
            else (cache.attend(query, **options), None)
        )
        for b, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            assert (output[b, :, count:] == 0).all()
            if count:
                own = (x[b : b + 1, :, :length] for x in (key, value))
                of_rows = (x[b : b + 1, :, :count] for x in (output, query))
                ends = None if logsumexp is None else logsumexp[b : b + 1, :, :count]
                check_sequence(score, *of_rows, *own, ends, **SMALL)


@pytest.mark.parametrize("new", [4, 8, 16])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("levels", [(16, 8, 4, 2, 1), (16, 8, 4, 2), (16, 8, 4), (16, 8)], ids=str)
def test_every_kernel(
    levels: tuple[int, ...], head_dim: int, new: int, dtype: torch.dtype, device: torch.device
) -> None:
    score = "softmax" if new < 16 else "sigmoid"
    check_attention(score, dtype, new, 8, levels, 450, device, rounded=False, head_dim=head_dim, window=128)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("new", [1, 16])
def test_groups(group: int, new: int, dtype: torch.dtype, device: torch.device) -> None:
    layout = {"head_dim": 128, "group": group, "window": 128, "residual": 20}
    check_attention("softmax", dtype, new, 4, (16, 8, 2), 700, device, rounded=False, **layout)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("levels", "window"), [((16, 8, 4, 2), 64), ((16, 8, 4, 2, 1), 96), ((16, 8), 128)], ids=str)
@pytest.mark.parametrize("new", [1, 5, 16])
def test_many_turns(
    score: Any, levels: tuple[int, ...], window: int, new: int, dtype: torch.dtype, device: torch.device
) -> None:
    """So many sequences leave a block for each head, which goes through all tokens; here they all have the same."""
    batch, heads, length = 54, 6, 930
    layout = {"levels": levels, "window": window, "group": 32, "residual": 30}
    key, value = tokens(length, 1, heads, dtype=dtype, device=device)
    key = key * torch.linspace(0.5, 3, length, device=device).to(dtype)[:, None]  # so that maxima rise
    one = cache_of(key, value, 1000, **layout)
    cache = attnx.StaircaseCache(batch, heads, 64, 1000, dtype=dtype, device=device, **layout)
    for x, y in zip(cache._memory, one._memory, strict=True):
        x.copy_(y.expand_as(x))
    query = queries(1, heads * 4, new, 64, dtype, device)
    output = cache.attend(query.expand(batch, -1, -1, -1), score=score)
    assert isinstance(output, Tensor)
    assert torch.equal(output, output[:1].expand_as(output))
    check_sequence(score, output[:1, :8], query[:, :8], key[:, :2], value[:, :2], None, **layout)


@pytest.mark.parametrize(("new", "heads"), [(65, 4), (130, 4), (50, 6)])
def test_prompts_in_chunks(new: int, heads: int, dtype: torch.dtype, device: torch.device) -> None:
    """Rows beyond 64 of a key head are blocks of their own; with 3 heads of a group they start amid a token."""
    check_attention("softmax", dtype, new, heads, (16, 8, 4, 2), 400, device, rounded=False)


def test_tail_beyond_the_length(dtype: torch.dtype, device: torch.device) -> None:
    """Two windows of 64 leave 22 tokens in one slot of the tail; what lies elsewhere in it takes no part."""
    cache = cache_of(*tokens(150, dtype=dtype, device=device), 300, **SMALL)
    query = queries(2, 4, 3, 64, dtype, device)
    expected = cache.attend(query)
    slot = int(cache._memory.state[0, 1])
    cache._memory.tail[:, :, :, 1 - slot] = torch.nan
    cache._memory.tail[:, :, :, slot, 22:] = torch.nan
    assert torch.equal(cache.attend(query), expected)


def test_windows_of_several_appends(dtype: torch.dtype, device: torch.device) -> None:
    """A window an append leads the further planes round their slots, of which one append of all uses the first."""
    key, value = tokens(450, dtype=dtype, device=device)
    query = queries(2, 4, 1, 64, dtype, device)
    cache = cache_of(key[:, :, :64], value[:, :, :64], 460, **SMALL)
    for end in range(128, 449, 64):
        cache.append(key[:, :, end - 64 : end], value[:, :, end - 64 : end])
        whole = cache_of(key[:, :, :end], value[:, :, :end], 460, **SMALL)
        assert torch.equal(cache.attend(query), whole.attend(query))


@pytest.mark.parametrize("bias", [None, "row"])
def test_bias_of_few_tokens(bias: Any, dtype: torch.dtype, device: torch.device) -> None:
    """With 5 tokens, of which the first row sees 3, weights show one token more or less in their bias."""
    key, value = tokens(5, dtype=dtype, device=device)
    query = queries(2, 4, 3, 64, dtype, device)
    options: dict[str, Any] = {"is_causal": True, "bias": bias}
    output = attnx.staircase_attention(query, cache_of(key, value, **SMALL), score="sigmoid", **options)
    expected = reference.sigmoid_attention(query.double(), key.double(), value.double(), **options)
    assert_close(output, expected, eager_sigmoid_attention(query, key, value, **options))


def test_keys_of_the_largest_range(dtype: torch.dtype, device: torch.device) -> None:
    """Their step, 512, times the largest number of a scaled query is still a float16."""
    key, value = tokens(200, dtype=dtype, device=device)
    key[..., 0] = torch.tensor([6.5e4, -6.5e4], device=device).to(dtype).repeat(100)
    query = queries(2, 4, 3, 64, dtype, device)
    query[..., 0] = 3.9
    cache = cache_of(key, value, **SMALL)
    exact = dict(zip(("key", "value"), reference.staircase_dequantize(key, value, **SMALL), strict=True))
    options: dict[str, Any] = {"is_causal": True, "scale": 1e-5}
    output = attnx.staircase_attention(query, cache, **options)
    expected = reference.softmax_attention(query.double(), **exact, **options)
    assert_close(output, expected, eager_softmax_attention(query, key, value, **options))
