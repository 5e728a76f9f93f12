"""An allocation or a launch that fails leaves a staircase cache as it was, whichever it is; the next call is right."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from backends import Backend

HERE = Path(__file__).parent

pytestmark = pytest.mark.backends("cpu", "emulated")

# Each call is tried with its first allocation failing, then with its second one, and so on until none is left; the same
# for launches. The first argument says which of the two, the rest are names of calls.
WORKER = """
import copy, ctypes, itertools, sys
import torch
from torch import Tensor
from staircase_cases import SMALL, cache_of, same, tokens

library = ctypes.CDLL(None)
fail, left = {
    "allocation": (library.fail_allocation, library.allocations_left),
    "launch": (library.fail_launch, library.launches_left),
}[sys.argv[1]]
fail.argtypes, left.restype = [ctypes.c_long], ctypes.c_long
key, value = tokens(230, dtype=torch.float16)
cache = cache_of(key, value, 400, residual=20, **SMALL)
new = tuple(x[:, :, :140] for x in (key, value))
query, counts = torch.randn(2, 4, 3, 64).half(), torch.tensor([3, 140, 9])[::2]
other = copy.deepcopy(cache)
other.crop(100)
saved = other.state_dict()
calls = {
    "append": lambda x: x.append(*new),
    "append counts": lambda x: x.append(*new, counts),
    "crop the tail": lambda x: x.crop(-5),
    "crop windows": lambda x: x.crop(torch.tensor([100, 30, 150])[::2]),
    "reorder": lambda x: x.reorder(torch.tensor([1, 1, 0])),
    "expand": lambda x: x.expand(2),
    "load_state_dict": lambda x: x.load_state_dict(saved),
    "copy": copy.deepcopy,
    "attend": lambda x: x.attend(query, return_logsumexp=True),
    "attend sigmoid": lambda x: x.attend(query, score="sigmoid", query_lengths=counts.clamp(max=3)),
    "dequantize": lambda x: x.dequantize(),
}

def bits(x):
    return [x] if isinstance(x, Tensor) else [y for part in x or () for y in bits(part)]

for name in sys.argv[2:]:
    expected = copy.deepcopy(cache)
    result = calls[name](expected)
    for after in itertools.count():
        tried = copy.deepcopy(cache)
        memory, before = tried._memory, [x.clone() for x in tried._memory]
        fail(after)
        try:
            calls[name](tried)
        except (RuntimeError, MemoryError) as error:
            assert left() == -1, f"{name}: not what was to fail: {error}"
            message = str(error)
        else:
            assert left() >= 0, f"{name}: failure {after} was lost"
            fail(-1)
            break
        assert all(x is y for x, y in zip(tried._memory, memory)), name
        assert torch.equal(tried._memory.state, before[0]), name
        published_late = sys.argv[1] == "launch" and after > 0
        assert published_late or all(map(torch.equal, memory, before)), f"{name}: bytes changed by {message}"
        assert same(tried, cache), f"{name}: changed by {message}"
        again = calls[name](tried)
        assert same(tried, expected), f"{name}: wrong after {message}"
        if name != "copy":
            assert all(map(torch.equal, bits(again), bits(result))), f"{name}: another result after {message}"
        print(f"{name}: {after}: {message}".splitlines()[0])
"""

# Rows are drawn on all threads, each of which takes memory of its own.
DRAWN = """
import ctypes
import torch
import attnx

library = ctypes.CDLL(None)
library.fail_allocation.argtypes = [ctypes.c_long]
torch.set_num_threads(4)
options = dict(density=0.2, mode="topm", block_size=(64, 64), seed=1, offset=2)
attnx.probabilistic_block_mask(1, 8, 16384, 16384, **options)
for after in range(60):  # most of them in threads, which have a list for each of 2048 rows
    library.fail_allocation(after)
    try:
        attnx.probabilistic_block_mask(1, 8, 16384, 16384, **options)
    except RuntimeError as error:
        print(f"{after}: {error}".splitlines()[0], flush=True)
"""

CHANGES = ["append", "append counts", "crop the tail", "crop windows"]
READS = ["attend", "attend sigmoid", "dequantize"]
MOVES = ["reorder", "expand", "load_state_dict", "copy"]


@pytest.fixture(scope="module")
def preloaded(tmp_path_factory: pytest.TempPathFactory) -> str:
    library = tmp_path_factory.mktemp("library") / "libfailures.so"
    compiler = os.environ.get("CXX", "c++")
    command = [compiler, "-std=c++20", "-O2", "-shared", "-fPIC", "-o", library, HERE / "failures.cpp"]
    subprocess.run(command, check=True)
    return str(library)


def run_worker(*arguments: str, preloaded: str, program: str = WORKER) -> list[str]:
    """The failures that happened, as "call: number: message"."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=os.environ | {"LD_PRELOAD": preloaded, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


def test_an_allocation_that_fails_changes_nothing(preloaded: str, backend: Backend) -> None:
    if backend.name == "emulated":
        preloaded += ":libcudart.so.13"
    calls = [*CHANGES, *MOVES, *READS]
    happened = run_worker("allocation", *calls, preloaded=preloaded)
    assert {line.partition(":")[0] for line in happened} >= {*MOVES, *READS, "append counts", "crop windows"}
    ours, torchs = (
        r"staircase_\w+: memory: expected (\S+ bytes|some) .*, got none$",
        r".*: you tried to allocate \d+ bytes",
    )
    for line in happened:
        assert re.match(f"{ours}|{torchs}", line.split(": ", 2)[2]), line
    assert {line.partition(":")[0] for line in happened if re.search(ours, line)} >= {*READS, "append counts"}


@pytest.mark.backends("cpu")
def test_an_allocation_that_fails_in_a_thread_names_the_operator(preloaded: str, backend: Backend) -> None:
    happened = run_worker(preloaded=preloaded, program=DRAWN)
    assert len(happened) == 60
    ours = r"probabilistic_block_lists: memory: expected (\S+ bytes|some) .*, got none$"
    for line in happened:
        assert re.match(rf"{ours}|.*: you tried to allocate \d+ bytes", line.partition(": ")[2]), line
    assert sum("own lists" in line for line in happened) > 30


@pytest.mark.backends("emulated")
def test_a_launch_that_fails_changes_nothing(preloaded: str, backend: Backend) -> None:
    happened = run_worker("launch", *CHANGES, *READS, preloaded=f"{preloaded}:libcudart.so.13")
    for call in CHANGES:  # writes, then publishes
        of_call = [line for line in happened if line.startswith(call + ":")]
        assert len(of_call) == 2
        assert "_publish: CUDA error cudaErrorLaunchOutOfResources" in of_call[1]
    assert all("CUDA error cudaErrorLaunchOutOfResources" in line for line in happened)
    assert {line.partition(":")[0] for line in happened} == {*CHANGES, *READS}
