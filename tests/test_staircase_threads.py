"""Several threads use one staircase cache, in a process of its own, as what goes wrong there may be a crash.

ATTNX_STRESS_SECONDS=60 has them do so for longer.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.backends("cpu"), pytest.mark.usefixtures("backend")]

SECONDS = float(os.environ.get("ATTNX_STRESS_SECONDS", "2"))

# Two threads append and crop, a third one reads, and a fourth one moves and copies the memory. All tokens are equal, so
# that whatever is read must be that number, and so must attention over it; and both sequences have the same length.
PROGRAM = f"""
import copy, sys, threading, time, traceback
import attnx, torch

sys.setswitchinterval(1e-5)
torch.set_num_threads(1)
cache = attnx.StaircaseCache(2, 2, 64, 4096, window=64)
token = torch.full((2, 2, 700, 64), 3.0)
swapped = torch.tensor([1, 0])
end = time.monotonic() + {SECONDS}
failures, rounds = [], [0, 0, 0, 0]

def run(number, step):
    try:
        while time.monotonic() < end and not failures:
            step()
            rounds[number] += 1
    except BaseException:
        failures.append(traceback.format_exc())

def change():
    cache.append(token[:, :, :130], token[:, :, :130])
    cache.append(token, token)
    cache.crop(-830)

def check(cache):
    for x in cache.dequantize():
        assert (x == 3).all(), f"what was read is no token: {{x[x != 3]}}"

def read():
    check(cache)
    cache.append(token[:, :, :1], token[:, :, :1])
    output = cache.attend(token[:, :, :1])
    assert (output - 3).abs().max() < 1e-4, f"attention is wrong: {{output}}"
    cache.crop(-1)

def move():
    cache.reorder(swapped)
    cache.load_state_dict(cache.state_dict())
    other = copy.deepcopy(cache)
    first, second = other.lengths
    assert first == second, f"lengths of two states: {{first}}, {{second}}"
    check(other)
    assert cache.to("cpu") is cache
    assert cache.to("meta").batch_size == 2

steps = enumerate((change, change, read, move))
threads = [threading.Thread(target=run, args=step) for step in steps]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not failures, failures[0]
assert cache.length == 0, cache.length
print(rounds)
"""


def test_threads_take_turns() -> None:
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{result.returncode}: {result.stderr[-4000:]}"
