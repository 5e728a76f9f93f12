"""The staircase cache: its codes against the definition in float64, its attention, and that nothing is half-done."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attnx
from attnx import reference
from attnx.testing import assert_close, eager_sigmoid_attention
from staircase_cases import DTYPES, LEVELS, SMALL, cache_of, check_attention, same, tokens

NAME = "staircase_attention"
pytestmark = [pytest.mark.backends("cpu"), pytest.mark.usefixtures("backend")]


# The definition -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", LEVELS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantised_is_the_definition(
    levels: tuple[int, ...], dtype: torch.dtype, instruction_set: str, device: torch.device
) -> None:
    for length in (1, 63, 64, 200, 333):
        key, value = tokens(length, dtype=dtype)
        actual = cache_of(key, value, levels=levels, **SMALL).dequantize()
        expected = reference.staircase_dequantize(key, value, levels=levels, **SMALL)
        for x, y in zip(actual, expected, strict=True):
            assert torch.equal(x, y.float().to(dtype)), length


@pytest.mark.parametrize("options", [{}, {"window": 256, "group": 128}, {"window": 192, "group": 64}], ids=str)
def test_windows_and_groups(options: dict[str, Any]) -> None:
    key, value = tokens(1000, batch=1, head_dim=128)
    for x, y in zip(
        cache_of(key, value, **options).dequantize(), reference.staircase_dequantize(key, value, **options), strict=True
    ):
        assert torch.equal(x, y.float())


def test_numbers_at_the_edges_of_float16() -> None:
    key, value = tokens(128, batch=1, heads=1)
    key[..., 0], key[..., 1], key[..., 2] = 3.0, 0.1, 0.0  # a group of equal numbers, in float16 or not
    key[..., 3] *= 1e-7
    key[..., 4] *= 1e-30
    key[..., 5] *= 65503 / key[..., 5].abs().max()
    value[0, 0, 7, 3], value[0, 0, 7, 4] = 65504.0, -65504.0
    cache = cache_of(key, value, levels=(16, 8, 2), **SMALL)
    expected = reference.staircase_dequantize(key, value, levels=(16, 8, 2), **SMALL)
    for x, y in zip(cache.dequantize(), expected, strict=True):
        assert torch.equal(x, y.float())
    assert (cache.dequantize()[0][..., 0] == 3.0).all()
    assert (cache.dequantize()[0][..., 2] == 0.0).all()


@pytest.mark.parametrize("bits", [8, 4, 2, 1])
def test_error_bound(bits: int) -> None:
    original = tokens(64 * 3, batch=1)
    read = cache_of(*original, levels=(16, bits), **SMALL).dequantize()
    for x, y, dim in zip(original, read, (-2, -1), strict=True):  # keys are grouped by token, values by channel
        x, y = (z.double().transpose(dim, -1).unflatten(-1, (-1, 32)) for z in (x, y))
        low, high = x.amin(-1, True), x.amax(-1, True)
        rounding = 2**-9 * (low.abs() + high.abs())  # of minimum and step to float16
        bound = (high - low + rounding) / 2 ** (bits + 1)
        error = (y - x).abs()
        assert (error <= bound).all()
        assert (error > 0.9 * bound).any(), "the bound is near"


# Appending -----------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(data=st.data())
def test_any_sequence_of_appends_gives_the_same_cache(data: st.DataObject) -> None:
    levels = data.draw(st.sampled_from(LEVELS))
    chunks = data.draw(st.lists(st.integers(0, 50) | st.integers(50, 300), min_size=1, max_size=12))
    key, value = tokens(sum(chunks), dtype=data.draw(st.sampled_from(DTYPES)))
    at_once = cache_of(key, value, levels=levels, **SMALL)
    in_chunks = cache_of(key[:, :, :0], value[:, :, :0], at_once.max_length, levels=levels, **SMALL)
    for k, v in zip(key.split(chunks, 2), value.split(chunks, 2), strict=True):
        in_chunks.append(k, v)
    assert same(at_once, in_chunks)


def test_falling_is_quantising_directly() -> None:
    """Each window, through all its ages one by one, has the bits it would have had from the original."""
    key, value = tokens(64 * 6)
    cache = cache_of(key[:, :, :0], value[:, :, :0], 64 * 6, **SMALL)
    for length in range(64, 64 * 6 + 1, 64):
        cache.append(key[:, :, length - 64 : length], value[:, :, length - 64 : length])
        expected = reference.staircase_dequantize(key[:, :, :length], value[:, :, :length], **SMALL)
        for x, y in zip(cache.dequantize(), expected, strict=True):
            assert torch.equal(x, y.float())


def test_sequences_of_different_lengths() -> None:
    key, value = tokens(300, batch=3)
    cache = attnx.StaircaseCache(3, 2, 64, 300, **SMALL)
    cache.append(key[:, :, :150], value[:, :, :150], counts=torch.tensor([150, 7, 0]))
    cache.append(key[:, :, 150:], value[:, :, 150:], counts=torch.tensor([3, 150, 65]))
    assert cache.lengths.tolist() == [153, 157, 65]
    assert cache.length == 157
    query = torch.randn(3, 4, 5, 64, generator=torch.Generator().manual_seed(1))
    output = cache.attend(query, query_lengths=torch.tensor([5, 2, 3]))
    assert isinstance(output, Tensor)
    read = cache.dequantize()
    for b, parts in enumerate([[(0, 150), (150, 153)], [(0, 7), (150, 300)], [(150, 215)]]):
        k, v = (torch.cat([x[b : b + 1, :, i:j] for i, j in parts], 2) for x in (key, value))
        alone = cache_of(k, v, 300, **SMALL)
        for x, y in zip(read, alone.dequantize(), strict=True):
            assert torch.equal(x[b : b + 1, :, : alone.length], y)
            assert (x[b, :, alone.length :] == 0).all()
        count = [5, 2, 3][b]
        expected = alone.attend(query[b : b + 1, :, :count])
        assert isinstance(expected, Tensor)
        torch.testing.assert_close(output[b : b + 1, :, :count], expected)
        assert (output[b, :, count:] == 0).all()


@pytest.fixture
def interrupted() -> Iterator[None]:
    yield
    attnx._C.interrupt_staircase_append(-1)


@pytest.mark.parametrize("new", [1, 30, 64, 128, 192, 256, 300])
@pytest.mark.parametrize("old", [0, 40, 64, 191, 320])
def test_an_append_that_is_interrupted_changes_nothing(old: int, new: int, interrupted: None) -> None:
    key, value = tokens(old + new, batch=1)
    cache = cache_of(key[:, :, :old], value[:, :, :old], 800, **SMALL)
    before = copy.deepcopy(cache)
    for units in range(5):  # the keys and values of two heads: from nothing written to everything but the state
        attnx._C.interrupt_staircase_append(units)
        with pytest.raises(RuntimeError, match="interrupted after"):
            cache.append(key[:, :, old:], value[:, :, old:])
        attnx._C.interrupt_staircase_append(-1)
        assert same(cache, before), units
    cache.append(key[:, :, old:], value[:, :, old:])
    assert same(cache, cache_of(key, value, 800, **SMALL))


@pytest.mark.parametrize("residual", [1, 31, 64, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_newest_tokens_stay(residual: int, dtype: torch.dtype) -> None:
    key, value = tokens(64 * 5 + 7, dtype=dtype)
    options = SMALL | {"residual": residual}
    cache = cache_of(key[:, :, :0], value[:, :, :0], 400, **options)
    at = 0
    for count in (1, 30, 33, 64, 5, 150, 1, 1, 40, 2):
        cache.append(key[:, :, at : at + count], value[:, :, at : at + count])
        at += count
        expected = reference.staircase_dequantize(key[:, :, :at], value[:, :, :at], **options)
        for x, y, original in zip(cache.dequantize(), expected, (key, value), strict=True):
            assert torch.equal(x, y.float().to(dtype)), at
            newest = slice(max(at - residual, 0), at)
            assert torch.equal(x[:, :, newest], original[:, :, newest]), at
    assert (cache.bits()[-residual:] == 8 * dtype.itemsize).all()
    read, bits = cache.dequantize(), cache.bits()
    for length in (-3, 250, 128 + residual, 60):
        cache.crop(length)
        for x, y in zip(cache.dequantize(), read, strict=True):
            assert torch.equal(x, y[:, :, : cache.length])
        fallen = max(cache.length - residual, 0) // 64 * 64
        assert torch.equal(cache.bits()[:fallen], bits[:fallen])


# Attention ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [2, 4, 6, 16, 32])
@pytest.mark.parametrize("length_q", [1, 3, 40])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention(score: Any, dtype: torch.dtype, length_q: int, heads: int) -> None:
    for levels, length in (((16, 8, 4, 2), 333), ((16, 8, 4, 2, 1), 300), ((16, 4), 40)):
        check_attention(score, dtype, length_q, heads, levels, length)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("length_q", [1, 7])
def test_attention_on_each_instruction_set(
    length_q: int, score: Any, instruction_set: str, device: torch.device
) -> None:
    for dtype in DTYPES:
        for levels in LEVELS:
            check_attention(score, dtype, length_q, 4, levels, 333)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_parts_of_the_length_on_several_threads(score: Any, threads: int, device: torch.device) -> None:
    for length in (2048 + 70, 5000):
        check_attention(score, torch.float32, 1, 4, (16, 8, 4, 2), length)


def test_options() -> None:
    key, value = tokens(200)
    query = torch.randn(2, 4, 3, 64, generator=torch.Generator().manual_seed(1))
    cache = cache_of(key, value, **SMALL)
    read = dict(zip(("key", "value"), cache.dequantize(), strict=True))
    bias = torch.tensor([-1.0, -2.0, -3.0, 0.5])
    for options in ({"bias": bias}, {"bias": "row"}, {"bias": -4.0}, {"scale": 0.01}, {"is_causal": False}):
        options = {"is_causal": True, **options}
        output = attnx.staircase_attention(query, cache, score="sigmoid", **options)
        assert_close(
            output,
            reference.sigmoid_attention(query, **read, **options),
            eager_sigmoid_attention(query, **read, **options),
        )
    by_definition = reference.staircase_attention(query, key, value, **SMALL)
    assert torch.allclose(cache.attend(query).double(), by_definition, atol=1e-5)


# Cropping, reordering, saving ----------------------------------------------------------------------------------------


def test_crop_within_the_tail_is_exact() -> None:
    key, value = tokens(300)
    cache = cache_of(key, value, **SMALL)
    cache.crop(270)
    assert same(cache, cache_of(key[:, :, :270], value[:, :, :270], cache.max_length, **SMALL))


@pytest.mark.parametrize("length", [0, 1, 64, 100, 128, 200, 256])
def test_crop_across_windows_keeps_the_bits_there_are(length: int) -> None:
    key, value = tokens(64 * 5 + 9)
    cache = cache_of(key, value, 1000, **SMALL)
    read, bits = cache.dequantize(), cache.bits()
    cache.crop(length)
    assert cache.length == length
    for x, y in zip(cache.dequantize(), read, strict=True):
        assert torch.equal(x, y[:, :, :length])
    whole = length // 64 * 64
    assert torch.equal(cache.bits()[:whole], bits[:whole])
    # It goes on from there: new windows have their bits, and what was cut open is quantised from what was left of it.
    cache.append(key[:, :, length:], value[:, :, length:])
    left = tuple(
        torch.cat([x, y[:, :, length:]], 2) for x, y in zip((x[:, :, :length] for x in read), (key, value), strict=True)
    )
    expected = reference.staircase_dequantize(*left, **SMALL)
    for x, y, old in zip(cache.dequantize(), expected, read, strict=True):
        assert torch.equal(x[:, :, whole:], y.float()[:, :, whole:])
        fallen = cache.bits()[:whole] == bits[:whole]
        assert torch.equal(x[:, :, :whole][:, :, fallen], old[:, :, :whole][:, :, fallen])


def test_crop_each_sequence() -> None:
    cache = cache_of(*tokens(200), **SMALL)
    cache.crop(torch.tensor([200, 70]))
    assert cache.lengths.tolist() == [200, 70]


def test_reorder_copy_and_state_dict() -> None:
    key, value = tokens(300, batch=3)
    cache = attnx.StaircaseCache(3, 2, 64, 400, **SMALL)
    cache.append(key, value, counts=torch.tensor([300, 170, 40]))
    read = cache.dequantize()
    other = copy.deepcopy(cache)
    other.reorder(torch.tensor([2, 0, 0]))
    assert other.lengths.tolist() == [40, 300, 300]
    assert all(torch.equal(x, y[[2, 0, 0]]) for x, y in zip(other.dequantize(), read, strict=True))
    new = attnx.StaircaseCache(3, 2, 64, 400, **SMALL)
    new.load_state_dict(cache.state_dict())
    assert same(new, cache)
    new.append(key[:, :, :30], value[:, :, :30])
    assert not same(new, cache)
    assert all(torch.equal(x, y) for x, y in zip(cache.dequantize(), read, strict=True))


def test_reorder_and_load_keep_the_memory() -> None:
    """What was compiled or captured in a CUDA graph with the memory reads the sequences where they are now."""
    cache = cache_of(*tokens(300), **SMALL)
    cache.crop(torch.tensor([300, 70]))
    memory, saved = cache._memory, copy.deepcopy(cache.state_dict())
    read = cache.dequantize()
    cache.reorder(torch.tensor([1, 0]))
    assert cache.lengths.tolist() == [70, 300]
    assert all(torch.equal(x, y.flip(0)) for x, y in zip(cache.dequantize(), read, strict=True))
    cache.load_state_dict(saved)
    assert all(torch.equal(x, y) for x, y in zip(cache.dequantize(), read, strict=True))
    assert all(x is y for x, y in zip(cache._memory, memory, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 3}, r"^new_tail: expected shape \(2, 2, .*, got \(3, 2, "),
        ({"num_kv_heads": 1}, r"^new_tail: expected shape \(2, 2, .*, got \(2, 1, "),
        ({"dtype": torch.bfloat16}, r"^new_tail: expected float32 like the cache, got bfloat16"),
        ({"max_length": 900}, r"^codes: expected shape "),
    ],
    ids=str,
)
def test_another_memory_is_refused(options: dict[str, Any], message: str) -> None:
    cache = cache_of(*tokens(200), **SMALL)
    sizes = {"batch_size": 2, "num_kv_heads": 2, "head_dim": 64, "max_length": cache.max_length} | SMALL
    other = attnx.StaircaseCache(**(sizes | options))
    with pytest.raises(RuntimeError, match=message):
        torch.ops.attnx.staircase_assign_(*cache._memory, *other._memory, *cache._layout)


def test_crop_drops_tokens() -> None:
    cache = cache_of(*tokens(200), **SMALL)
    cache.crop(-3)
    assert cache.lengths.tolist() == [197, 197]
    cache.crop(torch.tensor([100, -70]))
    assert cache.lengths.tolist() == [100, 127]
    cache.crop(torch.tensor([-100, -1]))
    assert cache.lengths.tolist() == [0, 126]


@pytest.mark.parametrize("indices", [torch.int32, torch.int64], ids=str)
def test_reorder_and_expand_change_the_batch(indices: torch.dtype) -> None:
    cache = cache_of(*tokens(200, batch=3), **SMALL)
    read = cache.dequantize()
    cache.reorder(torch.tensor([2, 0], dtype=indices))
    cache.expand(3)
    assert cache.batch_size == 6
    chosen = [2, 2, 2, 0, 0, 0]
    assert all(torch.equal(x, y[chosen]) for x, y in zip(cache.dequantize(), read, strict=True))
    cache.append(*tokens(9, batch=6))
    assert cache.lengths.tolist() == [209] * 6


def test_moves_between_devices(device: torch.device) -> None:
    cache = cache_of(*tokens(200), **SMALL)
    assert cache.to("cpu") is cache.cpu() is cache
    moved = cache.to(device)
    assert moved.device.type == device.type
    assert same(moved.cpu(), cache)
    shapes = cache.to("meta")
    assert shapes.device.type == "meta"
    assert cache.device.type == "cpu"


@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_nbytes_is_the_formula(levels: tuple[int, ...]) -> None:
    batch, heads, head_dim, length, window, group = 2, 8, 128, 32768, 128, 32
    cache = attnx.StaircaseCache(batch, heads, head_dim, length, levels=levels, dtype=torch.bfloat16)
    bits = {bits: levels[1:].count(bits) for bits in levels[1:-1] if bits != levels[-1]}
    rings = sum(2 * count * window * (wide - levels[-1]) / 8 for wide, count in bits.items())
    numbers = length * (levels[-1] / 8 + 4 / group) + rings + 2 * window * 2
    assert cache.nbytes == pytest.approx(2 * batch * heads * head_dim * numbers, rel=0.02)


def test_appending_moves_and_grows_nothing() -> None:
    key, value = tokens(300)
    cache = cache_of(key[:, :, :10], value[:, :, :10], 400, **SMALL)
    before = [(x.data_ptr(), x.shape) for x in cache._memory]
    cache.append(key, value)
    assert before == [(x.data_ptr(), x.shape) for x in cache._memory]


# Bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": (16, 4, 8)}, r"^levels: expected 16, then .*, got \(16, 4, 8\)"),
        ({"levels": (8, 4)}, r"^levels: expected 16, then .*, got \(8, 4\)"),
        ({"levels": (16,)}, r"^levels: expected .* at least one of 8, 4, 2 and 1.*, got \(16,\)"),
        ({"levels": (16, 3)}, r"^levels: expected .*, got \(16, 3\)"),
        ({"window": 100}, r"^window: expected a multiple of group, 32, got 100"),
        ({"window": 0}, r"^window: expected a multiple of group, 32, got 0"),
        ({"group": 48}, r"^group: expected a multiple of 32, got 48"),
        ({"group": 64, "head_dim": 96}, r"^head_dim: expected a multiple of group, 64, got 96"),
        ({"head_dim": 288}, r"^head_dim: expected from 32 to 256, got 288"),
        ({"residual": -1}, r"^residual: expected from 0 to .*, got -1"),
        ({"num_kv_heads": 0}, r"^num_kv_heads: expected at least 1, got 0"),
        ({"batch_size": -1}, r"^batch_size: expected at least 0, got -1"),
        ({"max_length": 0}, r"^max_length: expected at least 1, got 0"),
        ({"dtype": torch.float64}, r"^dtype: expected one of float32, bfloat16, float16, got torch.float64"),
    ],
    ids=str,
)
def test_bad_cache(options: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"batch_size": 1, "num_kv_heads": 2, "head_dim": 64, "max_length": 256}
    with pytest.raises(RuntimeError, match=message):
        attnx.StaircaseCache(**good | options)


@pytest.mark.parametrize(
    ("place", "number", "message"),
    [
        (0, [16, 3], "levels: expected 16, then at least one of 8, 4, 2 and 1"),
        (1, 100, "window: expected a multiple of group, 32"),
        (2, 48, "group: expected a multiple of 32, got 48"),
        (3, -1, "residual: expected from 0 to"),
        (4, 0, "max_length: expected at least 1, got 0"),
    ],
)
def test_operators_check_the_layout_too(place: int, number: Any, message: str) -> None:
    cache = attnx.StaircaseCache(1, 2, 64, 256)
    layout = list(cache._layout)
    layout[place] = number
    with pytest.raises(RuntimeError, match=f"^{message}"):
        torch.ops.attnx.staircase_dequantize(*cache._memory, 0, 0, *layout)


def with_state(cache: attnx.StaircaseCache, sequence: int, i: int, x: int) -> dict[str, Any]:
    state = cache._memory.state.clone()
    state[sequence, i] = x
    return cache.state_dict() | {"state": state}


def dequantize(cache: attnx.StaircaseCache, first: int, count: int) -> tuple[Tensor, Tensor]:
    return torch.ops.attnx.staircase_dequantize(*cache._memory, first, count, *cache._layout)


@pytest.mark.backends("cpu", "emulated", "cuda")
def test_no_heads_are_refused(dtype: torch.dtype, device: torch.device) -> None:
    cache = attnx.StaircaseCache(1, 1, 64, 200, dtype=dtype, device=device, **SMALL)
    memory = (x[:, :0] if x.dim() > 2 else x for x in cache._memory)
    with pytest.raises(RuntimeError, match=r"^tail: expected at least 1 head, got shape \(1, 0, 2, 2, 64, 64\)"):
        torch.ops.attnx.staircase_dequantize(*memory, 0, 0, *cache._layout)


@pytest.mark.backends("cpu", "emulated")  # where the host sees all numbers
def test_bad_calls_change_nothing(dtype: torch.dtype) -> None:
    key, value = tokens(150, dtype=dtype)
    own, other = (str(x).removeprefix("torch.") for x in (dtype, torch.float64))
    cache = cache_of(key, value, 200, **SMALL)
    before = copy.deepcopy(cache)
    nan = key.clone()
    nan[1, 1, 149, 63] = float("nan")
    large = value.clone()
    large[0, 0, 0, 0] = 7e4
    query = torch.zeros(2, 4, 1, 64, dtype=dtype)
    k, v = key[:, :, :1], value[:, :, :1]
    other_length = attnx.StaircaseCache(2, 2, 64, 201, dtype=dtype, **SMALL).state_dict()
    other_batch = attnx.StaircaseCache(3, 2, 64, 200, dtype=dtype, **SMALL).state_dict()
    other_levels = attnx.StaircaseCache(2, 2, 64, 200, levels=(16, 8), dtype=dtype, **SMALL).state_dict()
    other_dtype = cache.state_dict() | {"tail": cache._memory.tail.double()}
    int32, too_many = torch.ones(2, dtype=torch.int32), torch.tensor([1, 2])
    calls: list[tuple[str, Callable[[], object]]] = [
        (r"^key: expected at most 50 more tokens, .*got 150", lambda: cache.append(key, value)),
        (rf"^key: expected {own} like the cache, got {other}", lambda: cache.append(k.double(), v)),
        (rf"^value: expected {own} like the cache, got {other}", lambda: cache.append(k, v.double())),
        (r"^key: expected shape \(2, 2, 1, 64\), got \(2, 1, 1, 64\)", lambda: cache.append(k[:, :1], v[:, :1])),
        (r"^value: expected shape \(2, 2, 2, 64\), got \(2, 2, 1, 64\)", lambda: cache.append(key[:, :, :2], v)),
        (r"^key: expected 4 dimensions", lambda: cache.append(key[0], value[0])),
        (r"^key: expected finite .* at \(1, 1, 9\)", lambda: cache.append(nan[:, :, 140:], value[:, :, 140:])),
        (r"^value: expected finite .* at \(0, 0, 0\)", lambda: cache.append(k, large[:, :, :1])),
        (r"^counts: expected from 0 to the length of key, 1, got 2", lambda: cache.append(k, v, too_many)),
        (r"^counts: expected int64, got int32", lambda: cache.append(k, v, int32)),
        (r"^counts: expected shape \(2,\)", lambda: cache.append(k, v, torch.ones(3, dtype=torch.int64))),
        (r"^length: expected from -150 to the 150 tokens of sequence 0, got 151", lambda: cache.crop(151)),
        (r"^length: expected from -150 .*, got -151", lambda: cache.crop(-151)),
        (r"^length: expected from -150 to the 150 .* 1, got 160", lambda: cache.crop(torch.tensor([3, 160]))),
        (rf"^query: expected {own} like the cache, got {other}", lambda: cache.attend(query.double())),
        (r"^query: expected heads to be a multiple of the 2 heads .*, got 3", lambda: cache.attend(query[:, :3])),
        (r"^query: expected shape \(2, 4, 1, 64\)", lambda: cache.attend(query[..., :32])),
        (r"^query_lengths: expected from 0 .*, got 2", lambda: cache.attend(query, query_lengths=too_many)),
        (r'^score: expected "sigmoid" or "softmax", got', lambda: cache.attend(query, score="hard")),  # type: ignore[arg-type]
        (r'^bias: expected None with score="softmax", got 1.0', lambda: cache.attend(query, bias=1.0)),
        (r"^scale: expected a finite number", lambda: cache.attend(query, scale=float("inf"))),
        (r"^sequences: expected from 0 to 1, got \[1, 2\]", lambda: cache.reorder(too_many)),
        (r"^sequences: expected from 0 to 1, got \[-1\]", lambda: cache.reorder(torch.tensor([-1]))),
        (r"^sequences: expected one dimension .*, got \(1, 1\)", lambda: cache.reorder(torch.tensor([[0]]))),
        (r"^sequences: .* int64 or int32, got .* of torch.float32", lambda: cache.reorder(torch.tensor([0.0]))),
        (r"^beams: expected at least 1, got 0", lambda: cache.expand(0)),
        (r"^sequence: expected from 0 to 1, got 2", lambda: cache.bits(2)),
        (r"^state: expected max_length 200, got 201", lambda: cache.load_state_dict(other_length)),
        (r"^state: expected state .*, got ", lambda: cache.load_state_dict(other_batch)),
        (r"^state: expected levels \(16, 8, 4, 2\), got \(16, 8\)", lambda: cache.load_state_dict(other_levels)),
        (r"^state: expected tail .*, got .* of torch.float64", lambda: cache.load_state_dict(other_dtype)),
        (r"^state: expected codes .*, got None", lambda: cache.load_state_dict(cache.state_dict() | {"codes": None})),
        (r"^state: .* something else for sequence 0", lambda: cache.load_state_dict(with_state(cache, 0, 0, -1))),
        (r"^state: expected format 1, got 2", lambda: cache.load_state_dict(cache.state_dict() | {"format": 2})),
        (r"^state: expected residual 0, got 7", lambda: cache.load_state_dict(cache.state_dict() | {"residual": 7})),
        (r"^state: .* something else for sequence 0", lambda: cache.load_state_dict(with_state(cache, 0, 0, 201))),
        (r"^state: .* something else for sequence 1", lambda: cache.load_state_dict(with_state(cache, 1, 3, 3))),
        (r"^first: expected from 0 to 200, got 201", lambda: dequantize(cache, 201, 0)),
        (r"^first: expected from 0 to 200, got -1", lambda: dequantize(cache, -1, 2**63 - 1)),
        (r"^first: expected from 0 to 200, got 9223372036854775807", lambda: dequantize(cache, 2**63 - 1, 2**63 - 1)),
        (r"^count: expected from 0 to 199, got 9223372036854775807", lambda: dequantize(cache, 1, 2**63 - 1)),
    ]
    for message, call in calls:
        with pytest.raises(RuntimeError, match=message):
            call()
        assert same(cache, before), message
    with pytest.raises(RuntimeError, match=r"^cache: expected at least one token, got an empty cache"):
        attnx.StaircaseCache(2, 2, 64, 200, dtype=dtype).attend(query)


def test_a_state_may_lie_in_any_order() -> None:
    """What is loaded lies as the cache's own memory does, so that no later call refuses it."""
    key, value = tokens(150)
    cache, other = (cache_of(key[:, :, :n], value[:, :, :n], 200, **SMALL) for n in (150, 20))
    saved = cache.state_dict() | {"codes": cache._memory.codes.mT.contiguous().mT}
    assert not saved["codes"].is_contiguous()
    other.load_state_dict(saved)
    assert same(other, cache)
    other.append(key[:, :, :9], value[:, :, :9])


def test_other_devices_are_refused_by_the_table(device: torch.device) -> None:
    query = torch.zeros(1, 4, 1, 64, device=device)
    here = attnx.explain(attnx.staircase_attention, query, attnx.StaircaseCache(1, 2, 64, 200, device=device))
    assert here.supported
    cache = attnx.StaircaseCache(1, 2, 64, 200, device="meta")
    query = torch.zeros(1, 2, 1, 64, device="meta")
    assert cache.attend(query).shape == query.shape  # shapes alone
    explanation = attnx.explain(attnx.staircase_attention, query, cache)
    assert not explanation.supported
    assert "backend meta" in str(explanation)


@pytest.mark.parametrize(
    "name", ["staircase_append_", "staircase_crop_", "staircase_assign_", "staircase_dequantize", NAME]
)
def test_without_a_kernel_the_table_refuses(name: str) -> None:
    """What a CUDA tensor meets: the fallback of every device that has no kernel."""
    cache = attnx.StaircaseCache(1, 2, 64, 200)
    rows = torch.zeros(1, 2, 1, 64)
    arguments: dict[str, tuple[Any, ...]] = {
        "staircase_append_": (*cache._memory, rows, rows, None, *cache._layout),
        "staircase_crop_": (*cache._memory, torch.tensor([0]), *cache._layout),
        "staircase_assign_": (*cache._memory, *cache._memory, *cache._layout),
        "staircase_dequantize": (*cache._memory, 0, 1, *cache._layout),
        NAME: (rows, *cache._memory, None, None, *cache._layout, "softmax", "none", 0.0, None, True),
    }
    key = torch._C.DispatchKey.CompositeExplicitAutograd
    with pytest.raises(NotImplementedError, match=r"^staircase_attention: no kernel for this call.\n  required: "):
        getattr(torch.ops.attnx, name).default._op_dk(key, *arguments[name])


# Under torch ---------------------------------------------------------------------------------------------------------


def test_opcheck() -> None:
    key, value = tokens(150)
    cache = cache_of(key, value, 400, **SMALL)
    query = torch.randn(2, 4, 3, 64)
    more = key[:, :, :70].contiguous(), value[:, :, :70].contiguous()
    tests = ("test_schema", "test_faketensor")
    layout = cache._layout
    options = ("softmax", "none", 0.0, None, True)
    lengths = torch.tensor([3, 2])
    ops = torch.ops.attnx
    torch.library.opcheck(
        ops.staircase_attention, (query, *cache._memory, lengths, None, *layout, *options), test_utils=tests
    )
    torch.library.opcheck(ops.staircase_dequantize, (*cache._memory, 0, 150, *layout), test_utils=tests)
    torch.library.opcheck(ops.staircase_append_, (*cache._memory, *more, None, *layout), test_utils=tests)
    torch.library.opcheck(ops.staircase_crop_, (*cache._memory, torch.tensor([90, 8]), *layout), test_utils=tests)
    other = copy.deepcopy(cache)
    torch.library.opcheck(ops.staircase_assign_, (*cache._memory, *other._memory, *layout), test_utils=tests)


def test_compiled_beam_step() -> None:
    """Beams change places within the graph, which is compiled once."""
    cache, plain = (cache_of(*tokens(90), 400, **SMALL) for _ in range(2))

    def step(query: Tensor, beams: Tensor) -> Tensor:
        cache.reorder(beams)
        return cache.attend(query)

    query, beams = torch.randn(2, 4, 1, 64), torch.tensor([1, 1])
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for order in (torch.tensor([1, 0]), beams):
        actual = compiled(query, order)
        plain.reorder(order)
        assert torch.equal(actual, plain.attend(query))
        assert same(cache, plain)


def test_compiled_decode_step() -> None:
    key, value = tokens(90)
    query = torch.randn(2, 4, 1, 64, generator=torch.Generator().manual_seed(1))
    cache, plain = (cache_of(key[:, :, :60], value[:, :, :60], 400, **SMALL) for _ in range(2))

    def step(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        cache.append(key, value)
        output = cache.attend(2 * query)
        assert isinstance(output, Tensor)
        return output + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for t in range(60, 90):
        new = key[:, :, t : t + 1], value[:, :, t : t + 1]
        plain.append(*new)
        expected = plain.attend(2 * query)
        assert isinstance(expected, Tensor)
        assert torch.equal(compiled(query, *new), expected + 1)
    assert same(cache, plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    """Keys, values and queries become what the cache has, whatever autocast's own dtype is."""
    key, value = tokens(150)
    query = torch.randn(2, 4, 3, 64, generator=torch.Generator().manual_seed(1))
    cache = attnx.StaircaseCache(2, 2, 64, 200, dtype=dtype, **SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        cache.append(key, value.bfloat16())
        output = cache.attend(query)
    plain = cache_of(key.to(dtype), value.bfloat16().to(dtype), 200, **SMALL)
    assert same(cache, plain)
    expected = plain.attend(query.to(dtype))
    assert isinstance(output, Tensor)
    assert isinstance(expected, Tensor)
    assert torch.equal(output, expected)


def test_no_gradient() -> None:
    key, value = tokens(20)
    cache = cache_of(key, value, **SMALL)
    query = torch.zeros(2, 4, 1, 64, requires_grad=True)
    output = cache.attend(query)
    assert isinstance(output, Tensor)
    with pytest.raises(NotImplementedError, match=r"^staircase_attention: no derivative"):
        output.sum().backward()
