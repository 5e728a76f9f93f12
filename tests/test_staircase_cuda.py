"""The staircase cache's CUDA kernels: the same memory as the CPU's, bit for bit, and attention over it."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnx
from attnx import reference
from attnx.testing import assert_close, eager_sigmoid_attention
from staircase_cases import LEVELS, SMALL, cache_of, check_attention, same, tokens

pytestmark = [pytest.mark.backends("emulated", "cuda"), pytest.mark.usefixtures("backend")]

DTYPES = [torch.bfloat16, torch.float16]
LAYOUTS: list[dict[str, Any]] = [
    {"levels": (16, 8, 4, 2)},
    {"levels": (16, 8, 4, 2, 1), "residual": 40},
    {"levels": (16, 4, 4), "window": 128, "group": 64},
    {"levels": (16, 8), "window": 64, "group": 32},
]

HEAD_DIMS_AND_GROUPS = [(64, 32), (64, 64), (96, 32), (128, 64), (192, 32), (192, 64), (256, 64)]

# The memory of caches after appends of random sizes and crops between them, as it is on the device of the first
# argument. What is drawn depends on the number of the cache alone.
WORKER = """
import random, sys
import torch
from staircase_cases import LEVELS, SMALL, cache_of, tokens
from test_staircase_cuda import DTYPES, HEAD_DIMS_AND_GROUPS, LAYOUTS

device, to = sys.argv[1:]
results = {}

def remember(name, cache):
    results[name] = [x.cpu().clone() for x in cache._memory]

def change_at_random(number):
    draw = random.Random(number)
    head_dim, group = HEAD_DIMS_AND_GROUPS[number % len(HEAD_DIMS_AND_GROUPS)]
    levels, dtype = draw.choice(LEVELS), DTYPES[number % 2]
    layout = {"group": group, "window": draw.choice([64, 128, 192]), "residual": draw.choice([0, 0, 1, 40, 100])}
    key, value = tokens(300, dtype=dtype, device=device, head_dim=head_dim, heads=1, seed=number)
    cache = cache_of(key[:, :, :0], value[:, :, :0], 700, levels=levels, **layout)
    for step in range(8):
        if step % 3 == 2:
            kept = [draw.randint(0, n) for n in cache.lengths.tolist()]
            cache.crop(torch.tensor(kept, device=device))
        else:
            count = draw.choice([1, draw.randint(2, 70), draw.randint(70, 300)])
            room = [min(count, 700 - n) for n in cache.lengths.tolist()]
            counts = torch.tensor([room[0], draw.randint(0, room[1])], device=device)
            start = draw.randint(0, 300 - count)
            cache.append(*(x[:, :, start : start + count] for x in (key, value)), counts)
    remember((number, head_dim, group, levels, str(dtype), *layout.items()), cache)

for dtype in DTYPES:
    for number, layout in enumerate(LAYOUTS):
        key, value = tokens(420, dtype=dtype, device=device, head_dim=64)
        key[..., 3], key[..., 4], value[0, 0, 7] = 0.1, 1e-7, -60000.0
        cache = cache_of(key[:, :, :0], value[:, :, :0], 430, **SMALL | layout)
        at = 0
        for count in (1, 62, 1, 130, 70, 100, 33, 23):
            cache.append(key[:, :, at : at + count], value[:, :, at : at + count])
            at += count
        remember((str(dtype), number, "full"), cache)
        cache.append(key[:, :, :9], value[:, :, :9], torch.tensor([9, 3], device=device))
        cache.crop(torch.tensor([300, -100], device=device))
        cache.append(key[:, :, :20], value[:, :, :20])
        remember((str(dtype), number, "cropped"), cache)
for number in range(14):
    change_at_random(number)
torch.save(results, to)
"""


def run_program(program: str, *arguments: str, **environment: str) -> None:
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=os.environ | {"PYTHONPATH": paths} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def run_worker(folder: Path, device: str, **environment: str) -> dict[Any, list[Tensor]]:
    file = folder / f"{device}{len(environment)}.pt"
    run_program(WORKER, device, str(file), **environment)
    return torch.load(file)


def test_memory_is_the_cpus(device: torch.device, tmp_path: Path) -> None:
    expected = run_worker(tmp_path, "cpu", ATTNX_CUDA_ON_HOST="0")
    actual = run_worker(tmp_path, device.type)
    assert expected.keys() == actual.keys()
    for call, memory in expected.items():
        for name, x, y in zip(("state", "codes", "ranges", "tail"), memory, actual[call], strict=True):
            assert torch.equal(x.view(torch.uint8), y.view(torch.uint8)), (call, name)


# Where the host does not see values, what does not fit a sequence leaves that sequence as it was.
UNSEEN = """
import sys
import torch
from staircase_cases import SMALL, cache_of, same, tokens

device, refused = sys.argv[1], sys.argv[2] == "refused"
key, value = tokens(150, dtype=torch.float16, device=device)

def numbers(*x):
    return torch.tensor(x, device=device)

def check(call, expected):
    cache = cache_of(key, value, 200, **SMALL)
    wanted = cache_of(key, value, 200, **SMALL)
    try:
        call(cache)
        assert not refused
    except RuntimeError as error:
        assert refused, error
        assert str(error).startswith(("key: expected", "counts: expected", "length: expected")), error
    else:
        expected(wanted)
    assert same(cache, wanted)

def append(*counts):
    return lambda x: x.append(key[:, :, :60], value[:, :, :60], numbers(*counts))

def crop(*lengths):
    return lambda x: x.crop(numbers(*lengths))

check(append(9, 61), append(9, 0))
check(append(-1, 9), append(0, 9))
check(append(50, 51), append(50, 0))
check(append(2**62, -(2**63)), append(0, 0))
check(lambda x: x.append(key[:, :, :60], value[:, :, :60]), append(0, 0))
check(crop(151, -5), crop(150, -5))
check(crop(100, -151), crop(100, 150))
check(crop(-(2**63), 2**63 - 1), crop(150, 150))
empty = cache_of(key[:, :, :0], value[:, :, :0], 200, **SMALL)
if not refused:
    for score in ("softmax", "sigmoid"):
        assert (empty.attend(key[:, :, :3], score=score) == 0).all(), score
"""


@pytest.mark.parametrize("debug", [False, True], ids=["unseen", "debug"])
def test_what_does_not_fit_changes_nothing(debug: bool, device: torch.device) -> None:
    run_program(
        UNSEEN,
        device.type,
        "refused" if debug else "left out",
        ATTNX_HOST_UNREAD="1",
        ATTNX_DEBUG="1" if debug else "0",
    )


@pytest.mark.parametrize("levels", LEVELS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantised_is_the_definition(levels: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    for length in (1, 63, 64, 200, 333):
        key, value = tokens(length, dtype=dtype, batch=1, device=device)
        actual = cache_of(key, value, levels=levels, **SMALL).dequantize()
        expected = reference.staircase_dequantize(key, value, levels=levels, **SMALL)
        for x, y in zip(actual, expected, strict=True):
            assert torch.equal(x, y.float().to(dtype)), length


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("levels", LEVELS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention(score: Any, levels: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    check_attention(score, dtype, 1, 8, levels, 333, device, rounded=False)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("heads", "length_q"), [(2, 1), (4, 3), (6, 1), (4, 17), (32, 2)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows(score: Any, heads: int, length_q: int, dtype: torch.dtype, device: torch.device) -> None:
    for length in (40, 200):
        check_attention(score, dtype, length_q, heads, (16, 8, 4, 2), length, device, rounded=False)


@pytest.mark.parametrize(
    ("head_dim", "group"), [(32, 32), (64, 64), (96, 32), (128, 32), (160, 32), (192, 64), (256, 128)]
)
@pytest.mark.parametrize("levels", [(16, 8, 4, 2), (16, 8), (16, 4), (16, 1)], ids=str)
def test_head_dims(
    head_dim: int, group: int, levels: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    layout = {"head_dim": head_dim, "group": group, "window": 128}
    check_attention("softmax", dtype, 2, 4, levels, 300, device, rounded=False, **layout)


@pytest.mark.parametrize("length", [1, 33, 64, 150, 260])
def test_residual(length: int, dtype: torch.dtype, device: torch.device) -> None:
    check_attention("softmax", dtype, 1, 4, (16, 8, 4, 2), length, device, rounded=False, residual=50)


def test_options(dtype: torch.dtype, device: torch.device) -> None:
    key, value = tokens(200, dtype=dtype, device=device)
    query = torch.randn(2, 4, 3, 64, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    cache = cache_of(key, value, **SMALL)
    read = dict(zip(("key", "value"), cache.dequantize(), strict=True))
    exact = {"query": query.double()} | {name: x.double() for name, x in read.items()}
    bias = torch.tensor([-1.0, -2.0, -3.0, 0.5], device=device)
    for options in ({"bias": bias}, {"bias": "row"}, {"bias": -4.0}, {"scale": 0.01}, {"is_causal": False}):
        options = {"is_causal": True, **options}
        output = attnx.staircase_attention(query, cache, score="sigmoid", **options)
        assert_close(
            output, reference.sigmoid_attention(**exact, **options), eager_sigmoid_attention(query, **read, **options)
        )


@pytest.mark.parametrize("magnitude", [1e-3, 300.0])
def test_queries_of_any_magnitude(magnitude: float, dtype: torch.dtype, device: torch.device) -> None:
    """Queries are scaled to what float16 can hold times a step: the scale must not show."""
    key, value = tokens(200, dtype=dtype, device=device)
    query = torch.randn(2, 4, 1, 64, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    cache = cache_of(key, value, **SMALL)
    expected = cache.attend(query)
    power = 2.0 ** round(torch.tensor(magnitude).log2().item())
    actual = cache.attend(query * power, scale=0.125 / power)
    assert isinstance(actual, Tensor)
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(actual, expected)


def test_sequences_of_different_lengths(dtype: torch.dtype, device: torch.device) -> None:
    key, value = tokens(300, batch=3, dtype=dtype, device=device)
    cache = attnx.StaircaseCache(3, 2, 64, 300, dtype=dtype, device=device, **SMALL)
    cache.append(key[:, :, :150], value[:, :, :150], counts=torch.tensor([150, 7, 0], device=device))
    cache.append(key[:, :, 150:], value[:, :, 150:], counts=torch.tensor([3, 150, 65], device=device))
    assert cache.lengths.tolist() == [153, 157, 65]
    query = torch.randn(3, 4, 5, 64, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    output, logsumexp = cache.attend(query, query_lengths=torch.tensor([5, 2, 3], device=device), return_logsumexp=True)
    for b, parts in enumerate([[(0, 150), (150, 153)], [(0, 7), (150, 300)], [(150, 215)]]):
        k, v = (torch.cat([x[b : b + 1, :, i:j] for i, j in parts], 2) for x in (key, value))
        alone = cache_of(k, v, 300, **SMALL)
        count = [5, 2, 3][b]
        expected, expected_logsumexp = alone.attend(query[b : b + 1, :, :count], return_logsumexp=True)
        torch.testing.assert_close(output[b : b + 1, :, :count], expected)
        torch.testing.assert_close(logsumexp[b : b + 1, :, :count], expected_logsumexp)
        assert (output[b, :, count:] == 0).all()


def test_the_same_bits_every_time(dtype: torch.dtype, device: torch.device) -> None:
    cache = cache_of(*tokens(700, batch=1, dtype=dtype, device=device), **SMALL)
    query = torch.randn(1, 4, 1, 64, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    first = cache.attend(query)
    assert isinstance(first, Tensor)
    for _ in range(3):
        again = cache.attend(query)
        assert isinstance(again, Tensor)
        assert torch.equal(again, first)


@pytest.mark.parametrize("new", [1, 64, 192, 300])
@pytest.mark.parametrize("old", [0, 40, 191])
def test_an_append_that_is_interrupted_changes_nothing(
    old: int, new: int, dtype: torch.dtype, device: torch.device
) -> None:
    key, value = tokens(old + new, batch=1, dtype=dtype, device=device)
    cache = cache_of(key[:, :, :old], value[:, :, :old], 800, **SMALL)
    before = copy.deepcopy(cache)
    try:
        for units in range(5):
            attnx._C.interrupt_staircase_append(units)
            with pytest.raises(RuntimeError, match="interrupted after"):
                cache.append(key[:, :, old:], value[:, :, old:])
            attnx._C.interrupt_staircase_append(-1)
            assert same(cache, before), units
    finally:
        attnx._C.interrupt_staircase_append(-1)
    cache.append(key[:, :, old:], value[:, :, old:])
    assert same(cache, cache_of(key, value, 800, **SMALL))


def test_explain(dtype: torch.dtype, device: torch.device) -> None:
    cache = cache_of(*tokens(200, dtype=dtype, device=device), **SMALL)
    query = torch.zeros(2, 4, 1, 64, dtype=dtype, device=device)
    text = str(attnx.explain(attnx.staircase_attention, query, cache))
    assert "attnx_staircase_decode, 8 rows x 32 keys, head_dim padded to 64" in text
    assert "backward" not in text


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast(dtype: torch.dtype, device: torch.device) -> None:
    """Keys, values and queries become what the cache has, whatever autocast's own dtype is."""
    key, value = tokens(150, device=device)
    query = torch.randn(2, 4, 3, 64, generator=torch.Generator().manual_seed(1)).to(device)
    cache = attnx.StaircaseCache(2, 2, 64, 200, dtype=dtype, device=device, **SMALL)
    with torch.autocast(device.type, torch.bfloat16):
        cache.append(key, value.bfloat16())
        output = cache.attend(query)
    plain = cache_of(key.to(dtype), value.bfloat16().to(dtype), 200, **SMALL)
    assert same(cache, plain)
    expected = plain.attend(query.to(dtype))
    assert isinstance(output, Tensor)
    assert isinstance(expected, Tensor)
    assert torch.equal(output, expected)


def test_autocast_of_either_device(dtype: torch.dtype, device: torch.device) -> None:
    """The rule of a GPU's autocast, which tensors of the emulator do not come by, casts alike."""
    key, value = tokens(70, device=device)
    caches = [attnx.StaircaseCache(2, 2, 64, 200, dtype=dtype, device=device, **SMALL) for _ in range(2)]
    caches[0].append(key.to(dtype), value.to(dtype))
    cast = torch._C.DispatchKey.AutocastCUDA
    ops, layout = torch.ops.attnx, caches[1]._layout
    ops.staircase_append_.default._op_dk(cast, *caches[1]._memory, key, value, None, *layout)
    assert same(*caches)
    options = ("softmax", "none", 0.0, None, True)
    query = key.repeat(1, 2, 1, 1)
    output, _ = ops.staircase_attention.default._op_dk(cast, query, *caches[1]._memory, None, None, *layout, *options)
    assert output.dtype == dtype


@pytest.mark.backends("cuda")  # the emulator captures no graphs
def test_a_captured_step_replays_at_any_length(dtype: torch.dtype, device: torch.device) -> None:
    """Tokens come, windows fill, and one is cut open, in replays: lengths and slots lie in device memory alone."""
    key, value = tokens(330, dtype=dtype, device=device)
    query = torch.randn(2, 4, 1, 64, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    cache, eager = (cache_of(key[:, :, :1], value[:, :, :1], 400, residual=20, **SMALL) for _ in range(2))
    new = [x[:, :, :3].clone() for x in (key, value)]
    counts, kept = torch.zeros(2, dtype=torch.int64, device=device), torch.zeros(2, dtype=torch.int64, device=device)

    def step(cache: attnx.StaircaseCache) -> Tensor:
        cache.append(*new, counts)
        cache.crop(kept)
        output = cache.attend(query)
        assert isinstance(output, Tensor)
        return output

    kept.fill_(-1)
    for x in (cache, eager):  # what is made once is made before the capture
        x.append(*new)
        step(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(cache)
    assert same(cache, eager), "a capture runs nothing"
    for at in range(0, 327, 3):
        for own, x in zip(new, (key, value), strict=True):
            own.copy_(x[:, :, at : at + 3])
        counts.copy_(torch.tensor([3, at % 4]))
        kept.copy_(torch.tensor([70, -1]) if at == 150 else torch.tensor([-1, -1]))
        graph.replay()
        assert torch.equal(captured, step(eager)), at
    assert cache.lengths.tolist() == eager.lengths.tolist()
    assert same(cache, eager)
