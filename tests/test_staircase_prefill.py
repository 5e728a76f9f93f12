"""Attention of a chunk of new tokens over a staircase cache: the forward mainloop over tiles that are unpacked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnx
from attnx import reference
from attnx.testing import assert_close, eager_sigmoid_attention, eager_softmax_attention
from staircase_cases import LEVELS, SMALL, cache_of, eager_logsumexp, tokens

pytestmark = pytest.mark.usefixtures("backend")
on_cuda = pytest.mark.backends("emulated", "cuda")
LOOPS = ["sm80", pytest.param("sm90", marks=pytest.mark.needs("sm90"))]

REFERENCES: dict[str, Any] = {"softmax": reference.softmax_attention, "sigmoid": reference.sigmoid_attention}
EAGER: dict[str, Any] = {"softmax": eager_softmax_attention, "sigmoid": eager_sigmoid_attention}


def queries(batch: int, heads: int, length: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, heads, length, head_dim, generator=generator).to(device, dtype)


def filled(lengths: list[int], max_length: int, dtype: torch.dtype, device: torch.device, **options: Any) -> Any:
    """A cache of these sequences, and what was appended to it in three pieces."""
    heads, head_dim = options.pop("heads", 2), options.pop("head_dim", 64)
    layout = SMALL | options
    key, value = tokens(max(lengths), len(lengths), heads, head_dim, dtype, device=device)
    cache = attnx.StaircaseCache(len(lengths), heads, head_dim, max_length, dtype=dtype, device=device, **layout)
    ends = torch.tensor(lengths, device=device)
    at = 0
    for to in (max(lengths) // 3, max(lengths) * 2 // 3, max(lengths)):
        cache.append(key[:, :, at:to], value[:, :, at:to], counts=(ends - at).clamp(0, to - at))
        at = to
    return cache, key, value, layout


def check(
    score: Any, cache: attnx.StaircaseCache, query: Tensor, counts: list[int] | None = None, **options: Any
) -> None:
    """Every sequence is compared with float64 over the numbers that the cache gives back."""
    lengths = cache.lengths.tolist()
    asked = {} if counts is None else {"query_lengths": torch.tensor(counts, device=query.device)}
    logsumexp = None
    if score == "softmax":
        output, logsumexp = cache.attend(query, return_logsumexp=True, **asked, **options)
    else:
        output = cache.attend(query, score=score, **asked, **options)
    read = cache.dequantize()
    for b, length in enumerate(lengths):
        count = query.shape[2] if counts is None else counts[b]
        assert (output[b, :, count:] == 0).all()
        own = dict(zip(("key", "value"), (x[b : b + 1, :, :length] for x in read), strict=True))
        options_of_call = {"is_causal": True} | options
        exact = {name: x.double() for name, x in own.items()}
        rows = query[b : b + 1, :, :count]
        expected = REFERENCES[score](rows.double(), **exact, **options_of_call)
        assert_close(output[b : b + 1, :, :count], expected, EAGER[score](rows, **own, **options_of_call))
        if logsumexp is not None:
            ends = reference.softmax_attention(rows.double(), **exact, **options_of_call, return_logsumexp=True)[1]
            baseline = eager_logsumexp(rows, own["key"])
            assert_close(logsumexp[b : b + 1, :, :count], ends, baseline, dtype=query.dtype, name="logsumexp")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("group", "new"), [(1, 17), (1, 300), (4, 17), (4, 100), (16, 17), (16, 33)])
def test_chunks(score: Any, group: int, new: int, dtype: torch.dtype, device: torch.device) -> None:
    """Sequences have lengths of their own: only the chunk, a window, less, more, and some have fewer new tokens."""
    lengths = [new, max(new, 64), new + 1, new + 190]
    cache, *_ = filled(lengths, max(lengths) + 50, dtype, device, heads=1)
    counts = [new, new // 2, new - 1, 0] if new == 17 else [new, 1, new, new - 3]
    check(score, cache, queries(len(lengths), group, new, 64, dtype, device), counts)


@pytest.mark.parametrize("length", [17, 63, 64, 65, 127, 128, 129, 191, 192, 300])
@pytest.mark.parametrize("residual", [0, 40])
def test_ends_of_windows(length: int, residual: int, dtype: torch.dtype, device: torch.device) -> None:
    """The tail is empty, or nearly, or all there is."""
    cache, *_ = filled([length], length, dtype, device, heads=1, residual=residual)
    check("softmax", cache, queries(1, 8, 17, 64, dtype, device))
    check("sigmoid", cache, queries(1, 8, 17, 64, dtype, device), is_causal=False)


@on_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("levels", LEVELS, ids=str)
@pytest.mark.parametrize(
    ("head_dim", "layout"),
    [(128, {}), (96, {"window": 96, "residual": 33}), (128, {"window": 128, "group": 64}), (256, {"group": 64})],
    ids=["128", "96", "128 by 64", "256 by 64"],
)
def test_numbers_are_those_of_dequantize(
    levels: tuple[int, ...], head_dim: int, layout: Any, dtype: torch.dtype, device: torch.device
) -> None:
    """The mainloop over the numbers in memory, in tiles of the same sizes, gives the same bits."""
    length = 470
    cache, *_ = filled([length], length, dtype, device, heads=1, head_dim=head_dim, levels=levels, **layout)
    query = queries(1, 4, 40, head_dim, dtype, device)
    with attnx.cuda_mainloop("sm80"):
        output = cache.attend(query)
        expected = attnx.softmax_attention(query, *cache.dequantize(), is_causal=True)
    assert torch.equal(output, expected)


@on_cuda
@pytest.mark.parametrize("mainloop", LOOPS)
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 160, 192, 256])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_head_dims(mainloop: Any, score: Any, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    cache, *_ = filled([200, 90], 230, dtype, device, head_dim=head_dim, levels=(16, 8, 4, 2, 1))
    with attnx.cuda_mainloop(mainloop):
        if mainloop == "sm90" and head_dim > 128:
            with pytest.raises(RuntimeError, match="its warps have no registers for 256 features"):
                cache.attend(queries(2, 4, 37, head_dim, dtype, device))
            return
        check(score, cache, queries(2, 4, 37, head_dim, dtype, device), [37, 20])


@on_cuda
@pytest.mark.needs("sm90")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_levels_on_hopper(score: Any, levels: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    cache, *_ = filled([470, 201], 470, dtype, device, heads=1, head_dim=128, levels=levels, residual=20)
    query = queries(2, 4, 40, 128, dtype, device)
    with attnx.cuda_mainloop("sm90"):
        check(score, cache, query, [40, 17])
        assert torch.equal(cache.attend(query, score=score), cache.attend(query, score=score))


@on_cuda
@pytest.mark.parametrize("mainloop", LOOPS)
def test_explain_says_why(mainloop: Any, dtype: torch.dtype, device: torch.device) -> None:
    cache, *_ = filled([100], 100, dtype, device, heads=1)
    query = queries(1, 4, 40, 64, dtype, device)
    with attnx.cuda_mainloop("auto" if mainloop == "sm90" else mainloop):
        explanation = attnx.explain(attnx.staircase_attention, query, cache)
    assert explanation.kernel == "staircase_attention [sm80]"
    assert ("its producers unpack codes more slowly" in str(explanation.reasons)) == (mainloop == "sm90")


@on_cuda
@pytest.mark.parametrize("mainloop", ["decode", *LOOPS])
@pytest.mark.parametrize("rows", [1, 16, 64, 65, 128, 130])
def test_every_mainloop_serves_any_rows(mainloop: Any, rows: int, dtype: torch.dtype, device: torch.device) -> None:
    cache, *_ = filled([260, 150], 300, dtype, device, heads=1, levels=(16, 8, 4, 2))
    query = queries(2, 1, rows, 64, dtype, device)
    with attnx.cuda_mainloop(mainloop):
        assert f"[{mainloop}]" in str(attnx.explain(attnx.staircase_attention, query, cache).kernel)
        if mainloop != "decode":
            check("softmax", cache, query)
        else:  # it does not round numbers to the dtype
            with attnx.cuda_mainloop("sm80"):
                expected = cache.attend(query)
            assert torch.allclose(cache.attend(query).float(), expected.float(), atol=4e-2, rtol=2e-2)


@on_cuda
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_rows_choose(head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    cache, *_ = filled([100], 100, dtype, device, heads=1, head_dim=head_dim)

    def kernel(rows: int) -> str:
        query = queries(1, rows, 1, head_dim, dtype, device)
        return str(attnx.explain(attnx.staircase_attention, query, cache).kernel)

    assert kernel(64) == "staircase_attention [decode]"
    assert kernel(65) == "staircase_attention [sm80]"


@on_cuda
def test_rows_that_are_not_aligned(dtype: torch.dtype, device: torch.device) -> None:
    cache, *_ = filled([150], 150, dtype, device, heads=1)
    query = queries(1, 4, 40, 64, dtype, device)
    wide = torch.full((1, 4, 40, 77), float("nan"), dtype=dtype, device=device)
    wide[..., 5:69] = query
    assert torch.equal(cache.attend(wide[..., 5:69]), cache.attend(query))
    turned = query.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(cache.attend(turned), cache.attend(query))


@pytest.mark.parametrize("head_dim", [64, 96])
def test_unused_memory_is_not_read(head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    """It has NaN everywhere before the first append; a crop leaves numbers behind the end."""
    lengths, layout = [201, 64, 31], SMALL | {"residual": 10}
    key, value = tokens(400, 3, 1, head_dim, dtype, device=device)
    query = queries(3, 4, 31, head_dim, dtype, device)
    outputs = []
    for spoilt in (False, True):
        cache = attnx.StaircaseCache(3, 1, head_dim, 400, dtype=dtype, device=device, **layout)
        if spoilt:
            for x in cache._memory[1:]:
                x.fill_(-1 if x.dtype == torch.int32 else float("nan"))
        counts = torch.tensor(lengths, device=device)
        cache.append(key[:, :, :201], value[:, :, :201], counts)
        outputs.append(cache.attend(query))
        cache.append(key[:, :, 201:], value[:, :, 201:])
        cache.crop(torch.tensor([300, 231, 100], device=device))
        outputs.append(cache.attend(query))
        outputs.append(cache.attend(query, score="sigmoid"))
    assert all(torch.equal(x, y) for x, y in zip(outputs[:3], outputs[3:], strict=True))
    assert all(x.isfinite().all() for x in outputs)
    check("softmax", cache, query)


@on_cuda
def test_many_heads_need_no_splits(dtype: torch.dtype, device: torch.device) -> None:
    """So many sequences that one block walks over all tokens, and again the same bits."""
    cache, *_ = filled([330] * 2 + [250], 400, dtype, device, heads=1)
    one = queries(1, 4, 40, 64, dtype, device)
    alone = attnx.StaircaseCache(90, 1, 64, 400, dtype=dtype, device=device, **SMALL)
    for x, y in zip(alone._memory, cache._memory, strict=True):
        x.copy_(y[:1].expand_as(x))
    output = alone.attend(one.expand(90, -1, -1, -1))
    assert torch.equal(output, output[:1].expand_as(output))
    check("softmax", cache, one.expand(3, -1, -1, -1))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_repeats_bit_for_bit(score: Any, dtype: torch.dtype, device: torch.device) -> None:
    cache, *_ = filled([300, 120], 700, dtype, device)
    query = queries(2, 8, 50, 64, dtype, device)
    assert torch.equal(cache.attend(query, score=score), cache.attend(query, score=score))


@pytest.mark.parametrize("bias", ["row", -1.5, torch.tensor([0.5, -1, -2, 0])], ids=["row", "number", "by head"])
def test_bias(bias: Any, dtype: torch.dtype, device: torch.device) -> None:
    bias = bias.to(device) if isinstance(bias, Tensor) else bias
    cache, *_ = filled([190, 66], 200, dtype, device, heads=1)
    check("sigmoid", cache, queries(2, 4, 40, 64, dtype, device), [40, 21], bias=bias)


@on_cuda
def test_a_chunk_at_a_time_is_a_prompt(dtype: torch.dtype, device: torch.device) -> None:
    """Chunks of any sizes go through a cache whose length only the device need know."""
    length = 310
    key, value = tokens(length, 1, 1, 64, dtype, device=device)
    query = queries(1, 4, length, 64, dtype, device)
    cache = cache_of(key[:, :, :0], value[:, :, :0], length, residual=length, **SMALL)  # nothing is quantised
    outputs, at = [], 0
    for count in (1, 100, 17, 64, 128):
        cache.append(key[:, :, at : at + count], value[:, :, at : at + count])
        outputs.append(cache.attend(query[:, :, at : at + count]))
        at += count
    expected = reference.softmax_attention(query.double(), key.double(), value.double(), is_causal=True)
    assert_close(torch.cat(outputs, 2), expected, eager_softmax_attention(query, key, value, is_causal=True))


@on_cuda
def test_decode_serves_caches_alone(dtype: torch.dtype, device: torch.device) -> None:
    query = queries(1, 1, 4, 64, dtype, device)
    with attnx.cuda_mainloop("decode"), pytest.raises(RuntimeError, match="got one without a staircase cache"):
        attnx.softmax_attention(query, query, query)
