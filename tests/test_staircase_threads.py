"""Several threads use one staircase cache, in a process of its own, as what goes wrong there may be a crash."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.backends("cpu"), pytest.mark.usefixtures("backend")]

SECONDS = float(os.environ.get("ATTNX_STRESS_SECONDS", "2"))

# Two threads append and crop, a third one reads. All tokens are equal, so that whatever is read must be that number,
# and so must attention over it.
PROGRAM = f"""
import sys, threading, time
import attnx, torch

sys.setswitchinterval(1e-5)
torch.set_num_threads(1)
cache = attnx.StaircaseCache(1, 2, 64, 4096, window=64)
token = torch.full((1, 2, 700, 64), 3.0)
end = time.monotonic() + {SECONDS}
failures = []

def run(step):
    try:
        while time.monotonic() < end and not failures:
            step()
    except RuntimeError as error:
        failures.append(str(error))

def change():
    cache.append(token[:, :, :130], token[:, :, :130])
    cache.append(token, token)
    cache.crop(-830)

def read():
    for x in cache.dequantize():
        assert ((x == 3) | (x == 0)).all(), "what was read is no token"
    cache.append(token[:, :, :1], token[:, :, :1])
    assert (cache.attend(token[:, :, :1]) - 3).abs().max() < 1e-4, "attention is wrong"
    cache.crop(-1)

def guarded():
    try:
        read()
    except AssertionError as error:
        failures.append(str(error))

threads = [threading.Thread(target=run, args=(step,)) for step in (change, change, guarded)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not failures, failures
assert cache.length == 0, cache.length
"""


def test_threads_take_turns() -> None:
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{result.returncode}: {result.stderr[-2000:]}"
